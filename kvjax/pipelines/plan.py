"""What fits on devices that are not here: `kvjax plan`."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from kvjax.hf import read_shape
from kvjax.mesh import make_mesh, parse_mesh
from kvjax.pipelines.plan_programs import (
    Program,
    Size,
    abstract_caches,
    abstract_params,
    compile_prefill,
    compile_step,
)
from kvjax.pipelines.plan_room import Room, Temporaries, estimate, extrapolate, ways
from kvjax.pipelines.plan_variants import (
    Variant,
    default_mesh,
    head_notes,
    planner,
    shallower,
    variants,
)
from kvjax.ranges import COUNT, SIZE, check_ranges, optional
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
"""Layers that are compiled; what they add to a program is what every further layer adds."""


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

    def __post_init__(self) -> None:
        given = {"context": self.context, "new_tokens": self.new_tokens, "batch": self.batch}
        rank, rope_dim = self.latent or (1, 0)
        check_ranges(given | {"latent[0]": rank, "latent[1]": rope_dim}, RANGES)


def plan_capacity(request: Request, check: bool = False) -> dict[str, Any]:
    """Bytes of a device, collectives of a layer and what fits, for every variant.

    Args:
        check: also compile the first variant's decode step at full depth, and compare.

    Returns:
        The request, mesh, notes, and `rows`, one a variant; see `plan_variant`. With `check`,
        "check" has the bytes of the whole program, extrapolated and compiled.

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
    rows, programs = [], None
    for variant in found:
        row, compiled = plan_variant(variant, size, request.dtype, mesh, topology)
        rows.append(row)
        programs = programs or compiled
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
        "notes": notes,
        "rows": rows,
    }
    if check and programs is not None:
        report["check"] = full_depth(found[0], size, request.dtype, mesh, programs)
    return report


def plan_variant(
    variant: Variant, size: Size, dtype: str, mesh: Any, topology: Topology
) -> tuple[dict[str, Any], tuple[Program, Program] | None]:
    """Bytes of one device, and what fits.

    Returns:
        weights, cache, decode_temporaries: bytes at the requested size;
        decode_temporaries_more: what one more sequence a group of devices adds; prefill: bytes
        that reading one sequence a group takes besides, its cache included;
        fits: whether they do; collectives_layer and collectives_outside: of a decode step, None
        where nothing was compiled; batch: the most sequences of the requested context;
        context: the longest of the requested batch. And the shallow decode programs.
    """
    room = Room.measure(variant.model, planner(variant, mesh, dtype), size, mesh, dtype)
    row: dict[str, Any] = {"variant": variant.name, "weights": room.weights}
    decodes = None
    if isinstance(mesh, Mesh):
        shallow = [shallower(variant, depth) for depth in DEPTHS]
        pairs = [compile_both(each, size, dtype, mesh) for each in shallow]
        layers = variant.model.config.num_layers
        prefills, decodes = (tuple(part) for part in zip(*pairs, strict=True))
        decode, prefill = (
            extrapolate(p, DEPTHS, layers, "temporaries") for p in (decodes, prefills)
        )
        more = growth(shallow[1], decodes[1], size, dtype, mesh)
        temporaries = Temporaries(float(decode), more, float(prefill))
        per_layer = per_step(decodes)
        outside = decodes[0].collectives - Counter({k: DEPTHS[0] * n for k, n in per_layer.items()})
        row |= {"collectives_layer": dict(per_layer), "collectives_outside": dict(outside)}
    else:
        temporaries = estimate(variant.model, size, room.ways, mesh, dtype)
        row |= {"collectives_layer": None, "collectives_outside": None}
    room = room.with_temporaries(size, temporaries)
    row |= {
        "cache": room.cache(size.batch, size.context),
        "decode_temporaries": round(temporaries.decode),
        "decode_temporaries_more": round(temporaries.decode_more),
        "prefill": room.prefill_bytes(size.context),
        "fits": room.needed(size.batch, size.context) <= topology.usable,
        "batch": room.most_sequences(size.context, topology.usable),
        "context": room.longest(size.batch, topology.usable),
    }
    return row, decodes  # type: ignore[return-value]


def compile_both(variant: Variant, size: Size, dtype: str, mesh: Any) -> tuple[Program, Program]:
    """Prefill of one group of sequences, and a decode step of all."""
    group = dataclasses.replace(size, batch=ways(mesh))
    plan = planner(variant, mesh, dtype)(size.context)
    params = abstract_params(variant.model, mesh, dtype)
    return (
        compile_prefill(variant.model, params, plan, group, mesh),
        compile_decode(variant, size, dtype, mesh),
    )


def compile_decode(variant: Variant, size: Size, dtype: str, mesh: Any) -> Program:
    """A decode step."""
    plan = planner(variant, mesh, dtype)(size.context)
    caches = abstract_caches(plan, size, variant.model.config.num_layers, dtype)
    params = abstract_params(variant.model, mesh, dtype)
    return compile_step(variant.model, params, caches, size, mesh)


def growth(variant: Variant, step: Program, size: Size, dtype: str, mesh: Any) -> float:
    """Bytes that one more sequence a group of devices adds to a decode step's temporaries."""
    wider = dataclasses.replace(size, batch=size.batch + MORE * ways(mesh))
    wide = compile_decode(variant, wider, dtype, mesh)
    return max(wide.temporaries - step.temporaries, 0) / MORE


def per_step(decodes: tuple[Program, ...]) -> Counter[str]:
    """Collectives that one more layer adds to a decode step."""
    more = decodes[1].collectives - decodes[0].collectives
    return Counter({kind: count // (DEPTHS[1] - DEPTHS[0]) for kind, count in more.items()})


def add_factors(rows: list[dict[str, Any]]) -> None:
    """How many times the full cache's sequences, and context, every variant has."""
    for row in rows:
        for key in ("batch", "context"):
            full = rows[0][key]
            row[f"{key}_factor"] = round(row[key] / full, 1) if full else None


def full_depth(
    variant: Variant, size: Size, dtype: str, mesh: Any, decodes: tuple[Program, ...]
) -> dict[str, Any]:
    """The decode step of all layers, extrapolated and compiled."""
    layers = variant.model.config.num_layers
    names = ("arguments", "temporaries", "results")
    guess = sum(extrapolate(decodes, DEPTHS, layers, name) for name in names)
    whole = compile_decode(variant, size, dtype, mesh)
    real = sum(getattr(whole, name) for name in names)
    return {
        "extrapolated": guess,
        "compiled": real,
        "relative_error": round(abs(guess - real) / real, 5),
        "collectives": dict(whole.collectives),
    }


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
