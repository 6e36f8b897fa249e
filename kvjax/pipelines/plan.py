"""What fits on devices that are not here: `kvjax plan`."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kvjax.headkv.allocators import HeadImportance
from kvjax.headkv.plan import unconverted
from kvjax.headkv.policy import Compress, Policy, resolve
from kvjax.headkv.scores import HeadScores, attention_heads, default_scores
from kvjax.headkv.split_plan import on_mesh
from kvjax.hf import read_shape
from kvjax.mesh import make_mesh, parse_mesh
from kvjax.nn import Transformer
from kvjax.pipelines.plan_programs import (
    Program,
    Size,
    abstract_caches,
    abstract_params,
    compile_prefill,
    compile_step,
)
from kvjax.pipelines.plan_room import Room, estimate, extrapolate, ways
from kvjax.topologies import Topology, device_bytes
from kvjax.transmla.shape import decoupled_shape

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


@dataclass(frozen=True)
class Variant:
    """One way to cache: a model and what stays of its prompts."""

    name: str
    model: Transformer
    policy: Policy


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
    mesh, notes = topology.abstract_mesh(sizes), []
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
    found = variants(model, request, notes)
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


def default_mesh(model: Transformer, topology: Topology, dtype: str) -> dict[str, int]:
    """Heads over as many devices as there are KV heads, or more where the weights need it; the
    batch over the rest."""
    attention = model.config.layers[0].attention
    query_heads, _ = attention_heads(attention)
    heads = getattr(unconverted(attention), "num_kv_heads", query_heads)
    ways = [n for n in range(1, topology.count + 1) if topology.count % n == query_heads % n == 0]
    fits = [n for n in ways if heads % n == 0 or n % heads == 0]
    tensor = max(n for n in fits if n <= heads)

    def too_large(tensor: int) -> bool:
        shape = topology.abstract_mesh({"data": topology.count // tensor, "tensor": tensor})
        return device_bytes(abstract_params(model, shape, dtype)) > 0.8 * topology.usable

    while too_large(tensor) and tensor < max(fits):
        tensor = min(n for n in fits if n > tensor)
    return {"data": topology.count // tensor, "tensor": tensor}


def variants(model: Transformer, request: Request, notes: list[str]) -> list[Variant]:
    """Full cache, 8-bit entries, the policies, and the converted model."""
    found = [
        Variant("full", model, Policy.parse("full")),
        Variant("int8", model, Policy.parse("full:entries=int8")),
    ]
    for text in request.policies:
        policy = Policy.parse(text)
        scores = default_scores(model.config)
        if scores is None and lacks_scores(policy):
            heads, _ = attention_heads(model.config.layers[0].attention)
            scores = HeadScores(np.ones((model.config.num_layers, heads, 1)))
            notes.append(f"{text}: no head scores, so all heads have the same budget.")
        found.append(Variant(text, model, resolve(policy, model.config, scores)))
    if request.latent is not None:
        rank, rope = request.latent
        latent = decoupled_shape(model, rank, rope)
        found.append(Variant(f"MLA {rank} + {rope}", latent, Policy.parse("full")))
    return found


def lacks_scores(policy: Policy) -> bool:
    """Whether budgets go by head scores that the policy does not name."""
    allocator = policy.allocator if isinstance(policy, Compress) else None
    return isinstance(allocator, HeadImportance) and allocator.scores is None


def plan_variant(
    variant: Variant, size: Size, dtype: str, mesh: Any, topology: Topology
) -> tuple[dict[str, Any], tuple[Program, Program] | None]:
    """Bytes of one device, and what fits.

    Returns:
        weights, cache, decode_temporaries: bytes at the requested size; prefill: bytes that
        reading one sequence a device group takes besides, its cache included;
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
        temporaries = [extrapolate(p, DEPTHS, layers, "temporaries") for p in (decodes, prefills)]
        per_layer = per_step(decodes)
        outside = decodes[0].collectives - Counter({k: DEPTHS[0] * n for k, n in per_layer.items()})
        row |= {"collectives_layer": dict(per_layer), "collectives_outside": dict(outside)}
    else:
        temporaries = estimate(variant.model, size, room.ways, mesh, dtype)
        row |= {"collectives_layer": None, "collectives_outside": None}
    room = room.with_temporaries(size, *temporaries)
    row |= {
        "cache": room.cache(size.batch, size.context),
        "decode_temporaries": temporaries[0],
        "prefill": room.prefill_bytes(size.context),
        "fits": room.needed(size.batch, size.context) <= topology.usable,
        "batch": room.most_sequences(size.context, topology.usable),
        "context": room.longest(size.batch, topology.usable),
    }
    return row, decodes  # type: ignore[return-value]


def planner(variant: Variant, mesh: Any, dtype: str) -> Any:
    """Prompt length to the variant's plan on the mesh."""

    def plan(prompt_len: int) -> Any:
        return on_mesh(
            variant.policy.plan(variant.model.config, prompt_len, jnp.dtype(dtype)), mesh
        )

    return plan


def shallower(variant: Variant, depth: int) -> Variant:
    """The variant with the first layers only; head scores too."""
    config, policy = variant.model.config, variant.policy
    model = Transformer(dataclasses.replace(config, layers=config.layers[:depth]))
    if isinstance(policy, Compress) and isinstance(policy.allocator, HeadImportance):
        assert policy.allocator.scores is not None
        scores = HeadScores(policy.allocator.scores.samples[:depth])
        allocator = dataclasses.replace(policy.allocator, scores=scores)
        policy = dataclasses.replace(policy, allocator=allocator)
    return Variant(variant.name, model, policy)


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


def head_notes(model: Transformer, sizes: dict[str, int]) -> list[str]:
    """Where there are more devices along the tensor axis than KV heads."""
    tensor = sizes.get("tensor", 1)
    heads = {getattr(layer.attention, "num_kv_heads", tensor) for layer in model.config.layers}
    return [
        f"tensor={tensor} is more than the {count} KV heads: {tensor // count} devices hold each, "
        f"so caches of heads take {tensor // count} times their bytes."
        for count in sorted(heads)
        if count < tensor
    ]


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
