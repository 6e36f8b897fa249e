"""`kvjax plan`: what fits on the devices of another machine.

`plan_capacity` compares the variants. For each variant, `plan_variant` measures a `Footprint`: the
bytes of one device as a function of batch and context. The largest batch and the longest context
follow from it.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from kvjax.capacity.devices import Topology
from kvjax.capacity.programs import Compiler, Program, Step, block_step, fused_step, prefill_bytes
from kvjax.capacity.variants import (
    Served,
    Variant,
    Workload,
    default_mesh,
    head_notes,
    shallower,
    variants,
)
from kvjax.checks import COUNT, SIZE, check_ranges, optional
from kvjax.decoding import FUSED_FROM, step_function
from kvjax.hf import read_shape
from kvjax.mesh import batch_axes, make_mesh, own_names, parse_mesh
from kvjax.nn import Transformer
from kvjax.prefilling import LONGEST_CHUNK, bucket_length

MORE = 8
"""Sequences per replica that the second compiled step has more than the first."""
DEPTHS = (2, 4)
"""Numbers of layers for which a step as one program is compiled. Further layers are assumed to add
what the last two of these add."""
QUERY_TILE, KEY_TILE = 256, 512
"""Queries and keys of a tile of attention logits, see `kvjax.cache.attention`."""
LONGEST = 2**20
"""Longest context in tokens that a plan looks for."""
RANGES = {
    "context": COUNT,
    "new_tokens": SIZE,
    "batch": optional(COUNT),
    "latent[0]": COUNT,
    "latent[1]": SIZE,
}
"""What the numbers of a `Request` may be."""


@dataclass(frozen=True)
class Request:
    """The question that `kvjax plan` answers.

    Attributes:
        config: config.json, or a checkpoint as `kvjax.load` takes it.
        topology: such as "v5e:4x4" or "h200:8".
        context: prompt tokens per sequence.
        new_tokens: per sequence.
        batch: sequences; None for one per replica of the model.
        mesh: None for `default_mesh`.
        policies: to compare with "full" and with "full" in 8-bit entries.
        latent: widths of the latent and of the rotary key of the converted model; None for
            `default_latent`, (0, 0) for no converted model.
        dtype: of weights and caches.
        compile: "block" or "step", as in `kvjax.generate`; None for what `kvjax.generate` chooses
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
    latent: tuple[int, int] | None = None
    dtype: str = "bfloat16"
    compile: str | None = None

    def __post_init__(self) -> None:
        given = {"context": self.context, "new_tokens": self.new_tokens, "batch": self.batch}
        rank, rope_dim = self.latent if self.latent and any(self.latent) else (1, 0)
        check_ranges(given | {"latent[0]": rank, "latent[1]": rope_dim}, RANGES)
        step_function(self.compiled, self.new_tokens)

    @property
    def compiled(self) -> str:
        """ "block" or "step"."""
        return self.compile or ("step" if self.new_tokens >= FUSED_FROM else "block")


def plan_capacity(request: Request, check: bool = False) -> dict[str, Any]:
    """Bytes of one device, collectives of a layer, and what fits, for every variant.

    Args:
        check: also compile the first variant's decode step as one program, and compare.

    Returns:
        The request, mesh, notes, and `rows`, one per variant; see `plan_variant`. With `check`,
        "check" has what `check_step` returns.

    Raises:
        ValueError: no such model or topology, or a mesh that does not fit the topology or the
            heads.
    """
    # Find the mesh. Without a compiler for the topology, only its shape is known.
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
    workload = Workload(request.batch or replicas(mesh), request.context, request.new_tokens)
    if workload.context + workload.new_tokens > model.config.context_length:
        notes.append(f"The model is made for {model.config.context_length} tokens.")
    # Plan every variant; they share one compiler, so equal programs are compiled once.
    found = variants(model, request.policies, request.latent, notes)
    compile = Compiler()
    rows = [plan_variant(each, request, workload, mesh, topology, compile) for each in found]
    add_factors(rows)
    notes += head_notes(model, sizes)
    report = {
        "config": request.config,
        "topology": f"{topology.name}: {topology.count} × {topology.kind.device_kind}",
        "usable_bytes": topology.usable,
        "mesh": ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items()),
        "batch": workload.batch,
        "context": workload.context,
        "new_tokens": workload.new_tokens,
        "dtype": request.dtype,
        "compile": request.compiled,
        "notes": notes,
        "rows": rows,
    }
    if check and isinstance(mesh, Mesh):
        report["check"] = check_step(found[0], request, workload, mesh, rows[0])
    return report


def plan_variant(
    variant: Variant,
    request: Request,
    workload: Workload,
    mesh: Any,
    topology: Topology,
    compile: Compiler,
) -> dict[str, Any]:
    """Bytes of one device, and what fits.

    Returns:
        weights, cache, decode_temporaries: bytes at the requested size;
        decode_temporaries_more: bytes that one more sequence per replica adds; prefill: bytes that
        reading one more sequence per replica takes, its cache included; fits: whether the
        requested size fits; collectives_layer and collectives_outside: of a decode step, None
        where nothing was compiled; batch: the most sequences of the requested context; context:
        the longest context of the requested batch.
    """

    def serve(workload: Workload) -> Served:
        return variant.served(workload, mesh, request.dtype)

    footprint = Footprint.measure(serve, workload, replicas(mesh))
    if isinstance(mesh, Mesh):
        single = dataclasses.replace(workload, batch=footprint.replicas)
        reading = prefill_bytes(serve(single), compile)
        step = decode_step(variant, request, workload, mesh, compile)
        # Compile the step at a second batch size: most temporaries do not grow with the batch.
        wide = dataclasses.replace(workload, batch=workload.batch + MORE * footprint.replicas)
        wider = decode_step(variant, request, wide, mesh, compile)
        more = max(wider.temporaries - step.temporaries, 0) / MORE
        temporaries = Temporaries(float(step.temporaries), more, float(reading))
        counts = dict(step.layer), dict(step.outside)
    else:
        temporaries = estimate(variant.model, workload, footprint.replicas, mesh, request.dtype)
        counts = None, None
    footprint = footprint.with_temporaries(workload, temporaries)
    return {
        "variant": variant.name,
        "weights": footprint.weights,
        "collectives_layer": counts[0],
        "collectives_outside": counts[1],
        "cache": footprint.cache(workload.batch, workload.context),
        "decode_temporaries": round(temporaries.decode),
        "decode_temporaries_more": round(temporaries.decode_more),
        "prefill": footprint.prefill_bytes(workload.context),
        "fits": footprint.needed(workload.batch, workload.context) <= topology.usable,
        "batch": footprint.most_sequences(workload.context, topology.usable),
        "context": footprint.longest(workload.batch, topology.usable),
    }


def decode_step(
    variant: Variant, request: Request, workload: Workload, mesh: Mesh, compile: Compiler
) -> Step:
    """A decode step of all layers, as `request.compiled` says: one program per layer, or one
    program, which is extrapolated from two depths."""
    if request.compiled == "block":
        return block_step(variant.served(workload, mesh, request.dtype), compile)
    programs = []
    for depth in DEPTHS:
        served = shallower(variant, depth).served(workload, mesh, request.dtype)
        programs.append(fused_step(served))
    return all_layers(programs, variant.model.config.num_layers)


def all_layers(programs: Sequence[Program], layers: int) -> Step:
    """A step of all layers as one program, extrapolated from the programs of DEPTHS layers."""
    more = programs[1].collectives - programs[0].collectives
    layer = Counter({kind: count // (DEPTHS[1] - DEPTHS[0]) for kind, count in more.items()})
    outside = programs[0].collectives - Counter({k: DEPTHS[0] * n for k, n in layer.items()})
    return Step(extrapolate(programs, DEPTHS, layers, "temporaries"), layer, outside)


def extrapolate(
    programs: Sequence[Program], depths: tuple[int, int], layers: int, name: str
) -> int:
    """Bytes of the program of all layers, on the line through the programs of two depths.

    Args:
        name: the attribute of `Program` to extrapolate.
    """
    first, second = (getattr(program, name) for program in programs)
    slope = (second - first) / (depths[1] - depths[0])
    return round(max(first + slope * (layers - depths[0]), first, second))


def check_step(
    variant: Variant, request: Request, workload: Workload, mesh: Mesh, row: dict[str, Any]
) -> dict[str, Any]:
    """Compares the planned bytes of a decode step with those of all layers as one program.

    Args:
        row: the variant's result of `plan_variant`: its weights, caches and decode temporaries
            are the planned bytes.
    """
    whole = fused_step(variant.served(workload, mesh, request.dtype))
    real = whole.arguments + whole.temporaries + whole.results
    guess = row["weights"] + row["cache"] + row["decode_temporaries"]
    return {
        "planned": guess,
        "compiled": real,
        "relative_error": round(abs(guess - real) / real, 5),
        "collectives": dict(whole.collectives),
    }


@dataclass(frozen=True)
class Temporaries:
    """Bytes of one device.

    Attributes:
        decode: of a decode step.
        decode_more: what one more sequence per replica adds to a decode step.
        prefill: of prefill with one sequence per replica.
    """

    decode: float
    decode_more: float
    prefill: float


@dataclass(frozen=True)
class Footprint:
    """Bytes of one device as a function of batch and context.

    Contexts count as whole buckets (`bucket_length`).

    Attributes:
        replicas: copies of the model on the mesh; batches are multiples of this number.
        weights: bytes.
        fixed, per_token: the caches of one sequence per replica take fixed + per_token · context.
        decode, decode_more: bytes of a decode step's temporaries, and what one more sequence per
            replica adds. Most temporaries are copies of weights, which do not depend on the batch.
        prefill: bytes per token of context that prefill takes besides caches. One sequence per
            replica is read at a time (`kvjax.prefill`), and the caches of all sequences
            exist meanwhile.
    """

    replicas: int
    weights: int
    fixed: float
    per_token: float
    decode: float = 0.0
    decode_more: float = 0.0
    prefill: float = 0.0

    @classmethod
    def measure(
        cls, serve: Callable[[Workload], Served], workload: Workload, replicas: int
    ) -> Footprint:
        """Weights and caches. Cache bytes are linear at least from half of the context upward.

        Args:
            serve: the shapes of a variant under a workload.
        """
        whole = bucket_length(workload.context)
        half = bucket_length(whole // 2)

        def held(context: int) -> tuple[int, int]:
            return serve(dataclasses.replace(workload, batch=replicas, context=context)).nbytes

        (weights, less), (_, more) = held(half), held(whole)
        slope = (more - less) / max(whole - half, 1)
        return cls(replicas, weights, more - slope * whole, slope)

    def with_temporaries(self, workload: Workload, temporaries: Temporaries) -> Footprint:
        """Adds the temporaries that were found for `workload`."""
        groups = workload.batch / self.replicas
        return dataclasses.replace(
            self,
            decode=max(temporaries.decode - groups * temporaries.decode_more, 0.0),
            decode_more=temporaries.decode_more,
            prefill=temporaries.prefill / bucket_length(workload.context),
        )

    def prefill_bytes(self, context: int) -> int:
        """Bytes that reading one more sequence per replica takes, its cache included."""
        return round(self.prefill * bucket_length(context)) + self.cache(self.replicas, context)

    def cache(self, batch: int, context: int) -> int:
        """Bytes of the caches. A batch that the replicas do not divide is on every replica."""
        groups = batch // self.replicas if batch % self.replicas == 0 else batch
        return round(groups * (self.fixed + self.per_token * bucket_length(context)))

    def needed(self, batch: int, context: int) -> int:
        """Bytes of prefill or of decode, whichever needs more."""
        groups = batch // self.replicas if batch % self.replicas == 0 else batch
        decode = self.decode + groups * self.decode_more
        # `prefill_bytes` adds the cache of one group to caches that exist already. With a single
        # group the two are the same cache, so it counts once.
        own = self.cache(self.replicas, context) if groups == 1 else 0
        more = max(decode, self.prefill_bytes(context) - own)
        return round(self.weights + self.cache(batch, context) + more)

    def most_sequences(self, context: int, usable: int) -> int:
        """The largest batch of this context that `usable` bytes hold; 0 for none."""
        groups = 0
        step = 2**20
        while step:
            if self.needed((groups + step) * self.replicas, context) <= usable:
                groups += step
            else:
                step //= 2
        return groups * self.replicas

    def longest(self, batch: int, usable: int) -> int:
        """The longest context of this batch that `usable` bytes hold, at most LONGEST."""
        if self.needed(batch, LONGEST) <= usable:
            return LONGEST
        low, high = 0, LONGEST
        while high - low > 1:
            middle = (low + high) // 2
            if self.needed(batch, middle) <= usable:
                low = middle
            else:
                high = middle
        return low


def replicas(mesh: Any) -> int:
    """Copies of the model on the mesh: devices along the axes that shard the batch."""
    return math.prod(mesh.shape[axis] for axis in batch_axes(mesh))


def estimate(
    model: Transformer, workload: Workload, replicas: int, mesh: Any, dtype: Any
) -> Temporaries:
    """The temporaries without a compiler: a guide, within about a factor of two.

    The estimate adds up what exists at the same time: the residual stream, the keys and values of
    two layers, the activations of a chunk, and a tile of attention logits.
    """
    c, tensor = model.config, mesh.shape.get(own_names(mesh).get("tensor"), 1)
    rows, item = workload.batch / replicas, jnp.dtype(dtype).itemsize
    layer = c.layers[0]
    base = layer.attention.unconverted
    # Bytes of one token's activations, and of the float32 logits of one tile.
    heads = base.query_heads / tensor
    width = getattr(layer.mlp, "width", c.hidden_size) / tensor
    token = item * (4 * c.hidden_size + 3 * width) + 4 * heads * 2 * QUERY_TILE
    tile = 4 * heads * QUERY_TILE * KEY_TILE * 3
    # Numbers per token that a layer caches: keys and values, or latent and rotary key.
    kept = base.cached_heads * sum(base.cached_widths)
    tokens = bucket_length(workload.context)
    stream = item * tokens * c.hidden_size / tensor
    own = 2 * item * tokens * kept / tensor
    logits = 4 * c.vocab_size / tensor
    prefill = stream + own + LONGEST_CHUNK * token + tile + logits
    return Temporaries(rows * (token + logits), token + logits, prefill)


def add_factors(rows: list[dict[str, Any]]) -> None:
    """Adds to each row how many times the full cache's batch and context it has."""
    for row in rows:
        for key in ("batch", "context"):
            full = rows[0][key]
            row[f"{key}_factor"] = round(row[key] / full, 1) if full else None


def readable(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """A table for people, with one column per row of the report."""

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
    """Collectives of a layer + outside the layers: "2 all-reduce + 1 all-reduce, 2 all-gather"."""
    if row["collectives_layer"] is None:
        return "not compiled"
    parts = (row["collectives_layer"], row["collectives_outside"])
    named = (", ".join(f"{count} {kind}" for kind, count in part.items()) for part in parts)
    return " + ".join(text or "none" for text in named)
