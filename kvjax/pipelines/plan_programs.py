"""Prefill and a decode step of a model that has no weights yet, for devices that are not here."""

from __future__ import annotations

import functools
import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from kvjax.cache.specs import with_shardings
from kvjax.cache.split import places
from kvjax.decoding import CHUNK, prefill
from kvjax.headkv.plan import Plan
from kvjax.mesh import AnyMesh, Layout
from kvjax.nn import Transformer
from kvjax.sharding import param_shapes, param_shardings
from kvjax.topologies import device_bytes

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")
HEAP = re.compile(r"^allocation \d+: size (\d+), (?:page \d+, )?preallocated-temp", re.MULTILINE)
CALL = re.compile(
    rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(.*?channel_id=(\d+).*?(?:op_name=\"([^\"]*)|$)"
)


@dataclass(frozen=True)
class Size:
    """What is served at a time: sequences, prompt tokens and new tokens of each."""

    batch: int
    context: int
    new_tokens: int


@dataclass(frozen=True)
class Program:
    """One compiled program, per device.

    Attributes:
        arguments, temporaries: bytes; what is written in place counts once, as an argument.
        results: bytes of what is not written in place.
        collectives: how many of each kind.
    """

    arguments: int
    temporaries: int
    results: int
    collectives: Counter[str]


def abstract_params(model: Transformer, mesh: Any, dtype: Any) -> Any:
    """The parameters' shapes, each where it lies on a mesh."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=place),
        param_shapes(model),
        param_shardings(model, mesh),
    )


def abstract_caches(plan: Plan, size: Size, layers: int, dtype: Any) -> Any:
    """The caches that prefill gives with this plan, which is for a mesh, each where it lies."""

    def make(layer: int) -> Any:
        cache = plan.start(layer, size.batch, size.context, size.new_tokens, jnp.dtype(dtype))
        return plan.finish(layer, cache, size.new_tokens)

    def joined() -> Any:
        return plan.join([make(layer) for layer in range(layers)])

    return located(jax.eval_shape(joined))


def located(caches: Any) -> Any:
    """Shapes of caches with the shardings that the caches themselves name."""

    def one(cache: Any) -> Any:
        parts, layout = places(cache)
        return with_shardings(_shape, parts, cache, layout.mesh)

    return [one(cache) for cache in caches] if isinstance(caches, list) else one(caches)


def compile_prefill(model: Transformer, params: Any, plan: Plan, size: Size, mesh: Mesh) -> Program:
    """The program that reads `size.batch` prompts of `size.context` tokens."""
    rows = NamedSharding(mesh, Layout.create(mesh, size.batch).spec("batch"))
    tokens = jax.ShapeDtypeStruct((size.batch, size.context), jnp.int32, sharding=rows)
    lengths = jax.ShapeDtypeStruct((size.batch,), jnp.int32, sharding=rows)
    settings = {"max_new_tokens": size.new_tokens, "chunk": CHUNK}
    return _compiled(prefill.lower(model, params, tokens, lengths, plan, **settings))


def compile_step(model: Transformer, params: Any, caches: Any, size: Size, mesh: Mesh) -> Program:
    """The program of one greedy decode step, the body of the loop in `kvjax.decoding.decode`."""
    rows = NamedSharding(mesh, Layout.create(mesh, size.batch).spec("batch"))
    tokens = jax.ShapeDtypeStruct((size.batch, 1), jnp.int32, sharding=rows)
    lengths = jax.ShapeDtypeStruct((size.batch,), jnp.int32, sharding=rows)
    return _compiled(decode_step.lower(model, params, tokens, caches, lengths))


@functools.partial(jax.jit, static_argnames="model", donate_argnames="caches")
def decode_step(
    model: Transformer, params: Any, tokens: jax.Array, caches: Any, rope_lengths: jax.Array
) -> tuple[jax.Array, Any]:
    """The most likely next tokens [B], and the caches with the ones that were given [B, 1]."""
    positions = caches[0].lengths[:, None]
    result: Any = model.apply(
        {"params": params}, tokens, positions, caches, rope_lengths=rope_lengths
    )
    return jnp.argmax(result[0][:, 0], axis=-1).astype(jnp.int32), result[1]


def _compiled(lowered: Any) -> Program:
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options=options)
        temporaries = heap_bytes(Path(folder))
    memory = compiled.memory_analysis()
    return Program(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes if temporaries is None else temporaries,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        count_collectives(compiled.as_text()),
    )


def heap_bytes(folder: Path) -> int | None:
    """Bytes that a program's temporaries take together, from what XLA wrote of their places.

    `memory_analysis` of TPU programs counts the gaps between them twice: a decode step's many
    small ones, each in 16 KiB of its own, look twice as large as they are.

    Returns:
        None where XLA wrote nothing that can be read.
    """
    texts = [file.read_text() for file in folder.glob("*buffer-assignment.txt")]
    sizes = [int(size) for text in texts for size in HEAP.findall(text)]
    return sum(sizes) if sizes else None


def count_collectives(text: str) -> Counter[str]:
    """Collectives of a compiled program; one that is done in pieces counts once."""
    return Counter(kind for kind, *_ in {call.groups() for call in CALL.finditer(text)})


def _shape(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def bytes_of(
    model: Transformer, plan: Plan, size: Size, mesh: AnyMesh, dtype: Any
) -> tuple[int, int]:
    """Bytes of a device: weights, and caches after prefill."""
    caches = abstract_caches(plan, size, model.config.num_layers, dtype)
    return device_bytes(abstract_params(model, mesh, dtype)), device_bytes(caches)
