"""The benchmark's cases: operations on random entries in the shapes of real models."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from pallas_kernels.entries import Entries, is_quantized, quantize, to_bits


class Gqa(NamedTuple):
    """Grouped-query attention: N query heads, K KV heads, head dim H."""

    N: int
    K: int
    H: int


class Mla(NamedTuple):
    """Latent attention: N query heads, latent rank L, rope dim R."""

    N: int
    L: int
    R: int


GQA = {
    "llama-3-8b": Gqa(32, 8, 128),
    "qwen2.5-7b": Gqa(28, 4, 128),
    "llama-2-7b": Gqa(32, 32, 128),
    "needle": Gqa(8, 4, 32),
}
"""Models by name; "needle" is the model that is embedded in kvjax."""

MLA = {
    "deepseek-v3": Mla(128, 512, 64),
    "llama-3-8b-transmla": Mla(32, 448, 128),
}
"""Models by name; the second is Llama-3-8B as `kvjax.transmla.convert` converts it by default."""

SKEW = (0.003, 0.003, 0.01, 0.03, 0.1, 0.2, 0.4, 1.0)
"""Budgets of heads, relative to the largest one, spread as HeadKV's budgets are."""
TILE = 64
"""Segments start at multiples of it, which are whole DMA tiles for every dtype."""


class Case(NamedTuple):
    """One operation at one size.

    Attributes:
        operation: name of a public function.
        model, batch, dtype: the shapes; `dtype` is that of the entries.
        context: live entries of a head, on average.
        budgets: "uniform" or "skewed" for the ragged operation, "" for the others.
        run: function of `arguments` and `implementation`.
        arguments: arrays.
        live_bytes: bytes of the live entries, which every implementation must read.
        flops: floating point operations of the products with these entries.
    """

    operation: str
    model: str
    batch: int
    context: int
    dtype: str
    budgets: str
    run: Callable[..., jax.Array]
    arguments: tuple[Any, ...]
    live_bytes: int
    flops: int


def gqa_case(model: str, batch: int, context: int, dtype: str) -> Case:
    """A full dense cache."""
    N, K, H = GQA[model]
    key = jax.random.key(0)
    q = queries(key, (batch, N, H), dtype)
    k, v = (entries(jax.random.fold_in(key, i), (batch, K, context, H), dtype) for i in (1, 2))
    arguments = q, k, v, jnp.full((batch,), context, jnp.int32)
    return Case(
        "gqa_decode",
        model,
        batch,
        context,
        dtype,
        "",
        pallas_kernels.gqa_decode,
        arguments,
        size_of((k, v)),
        4 * batch * N * context * H,
    )


def ragged_case(model: str, batch: int, context: int, dtype: str, budgets: str) -> Case:
    """A pool with as many entries as the dense case, spread evenly over heads or not."""
    N, K, H = GQA[model]
    capacities = head_budgets(K, context, budgets)
    starts = np.cumsum(-(-capacities // TILE) * TILE)
    rows = int(-(-starts[-1] // 64) * 64)
    starts = (0, *(int(x) for x in starts[:-1]))
    key = jax.random.key(0)
    q = queries(key, (batch, N, H), dtype)
    shape = batch, rows, H
    k, v = (as_stored(entries(jax.random.fold_in(key, i), shape, dtype)) for i in (1, 2))
    lengths = jnp.broadcast_to(jnp.asarray(capacities, jnp.int32), (batch, K))
    sizes = tuple(int(x) for x in capacities)

    def run(q, k, v, lengths, **settings):
        ragged = pallas_kernels.ragged_gqa_decode
        return ragged(q, k, v, starts, lengths, capacities=sizes, **settings)

    # Rows between the end of a segment and the next multiple of TILE are never live.
    live = size_of((k, v)) * int(capacities.sum()) // rows
    flops = 4 * batch * (N // K) * int(capacities.sum()) * H
    operation = "ragged_gqa_decode"
    held = (q, k, v, lengths)
    return Case(operation, model, batch, context, dtype, budgets, run, held, live, flops)


def mla_case(model: str, batch: int, context: int, dtype: str) -> Case:
    """A full latent cache."""
    N, L, R = MLA[model]
    keys = jax.random.split(jax.random.key(0), 4)
    q = queries(keys[0], (batch, N, L), dtype), queries(keys[1], (batch, N, R), dtype)
    held = (
        entries(keys[2], (batch, context, L), dtype),
        entries(keys[3], (batch, context, R), dtype),
    )
    arguments = *q, *held, jnp.full((batch,), context, jnp.int32)
    run = functools.partial(pallas_kernels.mla_decode, scale=float(L + R) ** -0.5)
    flops = 2 * batch * N * context * (2 * L + R)
    operation = "mla_decode"
    live = size_of(held)
    return Case(operation, model, batch, context, dtype, "", run, arguments, live, flops)


def head_budgets(heads: int, mean: int, budgets: str) -> np.ndarray:
    """Entries of each head, `mean` on average."""
    if budgets == "uniform":
        return np.full(heads, mean)
    shares = np.resize(np.asarray(SKEW), heads)
    sizes = np.maximum((shares / shares.sum() * mean * heads).astype(int), 1)
    # The largest budget takes the rest that rounding leaves.
    sizes[-1] += mean * heads - sizes.sum()
    return sizes


def queries(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Random queries in the entries' dtype, or bfloat16 for quantized entries."""
    return jax.random.normal(key, shape, jnp.bfloat16 if is_quantized(dtype) else jnp.dtype(dtype))


def entries(key: jax.Array, shape: tuple[int, ...], dtype: str) -> Entries:
    """Random entries, quantized if `dtype` has 8 bits."""
    if is_quantized(dtype):
        return quantize(jax.random.normal(key, shape, jnp.float32), jnp.dtype(dtype))
    return jax.random.normal(key, shape, jnp.dtype(dtype))


def as_stored(pool: Entries) -> Entries:
    """The pool as a cache stores it: on CPUs 16-bit floats are `Bits`."""
    if not isinstance(pool, jax.Array) or pool.dtype.itemsize != 2:
        return pool
    return to_bits(pool) if jax.default_backend() == "cpu" else pool


def size_of(tree: Any) -> int:
    """Bytes of the arrays in a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
