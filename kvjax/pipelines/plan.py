"""What fits on devices that are not here: `kvjax plan`."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from kvjax.checks import COUNT, SIZE, check_ranges, optional
from kvjax.decoding import FUSED_FROM, step_function
from kvjax.hf import read_shape
from kvjax.mesh import make_mesh, parse_mesh
from kvjax.pipelines.plan_decode import Step, block_step, fused_step
from kvjax.pipelines.plan_prefill import prefill_bytes
from kvjax.pipelines.plan_programs import Compiler, Program
from kvjax.pipelines.plan_room import Room, Temporaries, estimate, extrapolate, ways
from kvjax.pipelines.plan_shapes import Served, Size
from kvjax.pipelines.plan_variants import (
    Variant,
    default_mesh,
    head_notes,
    shallower,
    variants,
)
from kvjax.topologies import Topology

MORE = 8  # sequences a group of devices, by which temporaries are seen to grow
RANGES = {
    "context": COUNT,
    "new_tokens": SIZE,
    "batch": optional(COUNT),
    "latent[0]": COUNT,
    "latent[1]": SIZE,
}
"""The numbers of a `Request`."""
DEPTHS = (2, 4)
"""Layers of a step that is compiled as one program; every further layer adds what these add."""


@dataclass(frozen=True)
class Request:
    """What `kvjax plan` was asked.

    Attributes:
        config: config.json, checkpoint directory or hub id.
        topology: such as "v5e:4x4" or "h200:8".
        context, new_tokens: of each sequence.
        batch: sequences; None for one a group of devices that holds the model.
        mesh: None for `default_mesh`.
        policies: of the cache, besides "full" with and without 8-bit entries.
        latent: widths of the latent and of the rotary key of the converted model; None for none.
        dtype: of weights and caches.
        compile: what a step of decoding compiles, as in `kvjax.generate`; None: what that takes
            on accelerators.

    Raises:
        ValueError: names every number out of its range.
    """

    config: str
    topology: str
    context: int
    new_tokens: int
    batch: int | None = None
    mesh: str | None = None
    policies: tuple[str, ...] = ("headkv:kv_size=512",)
    latent: tuple[int, int] | None = (512, 128)
    dtype: str = "bfloat16"
    compile: str | None = None

    def __post_init__(self) -> None:
        given = {"context": self.context, "new_tokens": self.new_tokens, "batch": self.batch}
        rank, rope_dim = self.latent or (1, 0)
        check_ranges(given | {"latent[0]": rank, "latent[1]": rope_dim}, RANGES)
        step_function(self.compiled, self.new_tokens)

    @property
    def compiled(self) -> str:
        """ "block" or "step"."""
        return self.compile or ("step" if self.new_tokens >= FUSED_FROM else "block")


def plan_capacity(request: Request, check: bool = False) -> dict[str, Any]:
    """Bytes of a device, collectives of a layer and what fits, for every variant.

    Args:
        check: also compile the first variant's decode step as one program, and compare.

    Returns:
        The request, mesh, notes, and `rows`, one a variant; see `plan_variant`. With `check`,
        "check" has what `check_step` returns.

    Raises:
        ValueError: no such model or topology, a mesh that does not fit it or the heads.
    """
    model, topology = read_shape(request.config), Topology.parse(request.topology)
    sizes = default_mesh(model, topology, request.dtype)
    sizes = sizes if request.mesh is None else parse_mesh(request.mesh)
    mesh, notes = topology.abstract_mesh(sizes), [*topology.notes]
    if math.prod(mesh.axis_sizes) != topology.count:
        raise ValueError(
            f"got a mesh of {math.prod(mesh.axis_sizes)} devices, expected {topology.count} for "
            f"{topology.name}"
        )
    try:
        mesh = make_mesh(sizes, topology.devices())
    except ValueError as error:
        notes.append(f"Temporaries are estimated, not compiled: {error}")
    size = Size(request.batch or ways(mesh), request.context, request.new_tokens)
    if size.context + size.new_tokens > model.config.context_length:
        notes.append(f"The model is made for {model.config.context_length} tokens.")
    found = variants(model, request.policies, request.latent, notes)
    compile = Compiler()
    rows = [plan_variant(each, request, size, mesh, topology, compile) for each in found]
    add_factors(rows)
    notes += head_notes(model, sizes)
    report = {
        "config": request.config,
        "topology": f"{topology.name}: {topology.count} × {topology.kind.device_kind}",
        "usable_bytes": topology.usable,
        "mesh": ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items()),
        "batch": size.batch,
        "context": size.context,
        "new_tokens": size.new_tokens,
        "dtype": request.dtype,
        "compile": request.compiled,
        "notes": notes,
        "rows": rows,
    }
    if check and isinstance(mesh, Mesh):
        report["check"] = check_step(found[0], request, size, mesh, rows[0])
    return report


def plan_variant(
    variant: Variant, request: Request, size: Size, mesh: Any, topology: Topology, compile: Compiler
) -> dict[str, Any]:
    """Bytes of one device, and what fits.

    Returns:
        weights, cache, decode_temporaries: bytes at the requested size;
        decode_temporaries_more: what one more sequence a group of devices adds; prefill: bytes
        that reading one more sequence a group takes, its cache included; fits: whether they do;
        collectives_layer and collectives_outside: of a decode step, None where nothing was
        compiled; batch: the most sequences of the requested context; context: the longest of the
        requested batch.
    """

    def serve(size: Size) -> Served:
        return variant.served(size, mesh, request.dtype)

    room, counts = Room.measure(serve, size, ways(mesh)), (None, None)
    if isinstance(mesh, Mesh):
        reading = prefill_bytes(serve(dataclasses.replace(size, batch=room.ways)), compile)
        step = decode_step(variant, request, size, mesh, compile)
        wide = dataclasses.replace(size, batch=size.batch + MORE * room.ways)
        wider = decode_step(variant, request, wide, mesh, compile)
        more = max(wider.temporaries - step.temporaries, 0) / MORE
        temporaries = Temporaries(float(step.temporaries), more, float(reading))
        counts = dict(step.layer), dict(step.outside)
    else:
        temporaries = estimate(variant.model, size, room.ways, mesh, request.dtype)
    room = room.with_temporaries(size, temporaries)
    return {
        "variant": variant.name,
        "weights": room.weights,
        "collectives_layer": counts[0],
        "collectives_outside": counts[1],
        "cache": room.cache(size.batch, size.context),
        "decode_temporaries": round(temporaries.decode),
        "decode_temporaries_more": round(temporaries.decode_more),
        "prefill": room.prefill_bytes(size.context),
        "fits": room.needed(size.batch, size.context) <= topology.usable,
        "batch": room.most_sequences(size.context, topology.usable),
        "context": room.longest(size.batch, topology.usable),
    }


def decode_step(
    variant: Variant, request: Request, size: Size, mesh: Mesh, compile: Compiler
) -> Step:
    """A decode step of all layers: one by one, or as one program, of which two depths are
    compiled."""
    if request.compiled == "block":
        return block_step(variant.served(size, mesh, request.dtype), compile)
    programs = []
    for depth in DEPTHS:
        served = shallower(variant, depth).served(size, mesh, request.dtype)
        programs.append(fused_step(served))
    return all_layers(programs, variant.model.config.num_layers)


def all_layers(programs: Sequence[Program], layers: int) -> Step:
    """A step of all layers as one program, by the programs of DEPTHS layers."""
    more = programs[1].collectives - programs[0].collectives
    layer = Counter({kind: count // (DEPTHS[1] - DEPTHS[0]) for kind, count in more.items()})
    outside = programs[0].collectives - Counter({k: DEPTHS[0] * n for k, n in layer.items()})
    return Step(extrapolate(programs, DEPTHS, layers, "temporaries"), layer, outside)


def check_step(
    variant: Variant, request: Request, size: Size, mesh: Mesh, row: dict[str, Any]
) -> dict[str, Any]:
    """The decode step of all layers as one program: its bytes as planned and as compiled.

    The plan's are weights, caches and a step's temporaries, for the requested batch.
    """
    whole = fused_step(variant.served(size, mesh, request.dtype))
    real = whole.arguments + whole.temporaries + whole.results
    guess = row["weights"] + row["cache"] + row["decode_temporaries"]
    return {
        "planned": guess,
        "compiled": real,
        "relative_error": round(abs(guess - real) / real, 5),
        "collectives": dict(whole.collectives),
    }


def add_factors(rows: list[dict[str, Any]]) -> None:
    """How many times the full cache's sequences, and context, every variant has."""
    for row in rows:
        for key in ("batch", "context"):
            full = rows[0][key]
            row[f"{key}_factor"] = round(row[key] / full, 1) if full else None


def readable(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The report's rows as columns, for people."""

    def gib(name: str) -> list[str]:
        return [f"{row[name] / 2**30:.2f}" for row in rows]

    def factor(name: str) -> list[str]:
        values = [(row[name], row[f"{name}_factor"]) for row in rows]
        return [str(n) if times is None else f"{n} ({times}×)" for n, times in values]

    table = {
        "weights, GiB a device": gib("weights"),
        "caches, GiB": gib("cache"),
        "decode's temporaries, GiB": gib("decode_temporaries"),
        "prefill of one more, GiB": gib("prefill"),
        "fits": ["yes" if row["fits"] else "no" for row in rows],
        "collectives a layer + besides": [describe_collectives(row) for row in rows],
        "most sequences": factor("batch"),
        "longest context": factor("context"),
    }
    names = [row["variant"] for row in rows]
    return [{"": title, **dict(zip(names, cells, strict=True))} for title, cells in table.items()]


def describe_collectives(row: dict[str, Any]) -> str:
    """Such as "2 all-reduce + 1 all-reduce, 2 all-gather": of a layer, and besides."""
    if row["collectives_layer"] is None:
        return "not compiled"
    parts = (row["collectives_layer"], row["collectives_outside"])
    named = (", ".join(f"{count} {kind}" for kind, count in part.items()) for part in parts)
    return " + ".join(text or "none" for text in named)
