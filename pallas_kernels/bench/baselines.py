"""Other implementations of the benchmark's cases: jax's own, and kernels of other packages."""

import importlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.bench.cases import Case, gqa_case
from pallas_kernels.entries import Quantized


def baselines(case: Case) -> dict[str, Callable[[], Any]]:
    """Functions of jax, or of this package on another cache, that do the case's work."""
    if case.operation == "ragged_gqa_decode":
        return {"dense": _dense(case)}
    if case.operation == "gqa_decode" and not isinstance(case.arguments[1], Quantized):
        return {"jax.nn": _dot_product_attention(case)}
    return {}


def _dense(case: Case) -> Callable[[], Any]:
    """The same number of entries in a dense cache, which shows the cost of ragged budgets."""
    dense = gqa_case(case.model, case.batch, case.context, case.dtype)
    run = jax.jit(dense.run)
    return lambda: run(*dense.arguments)


def _dot_product_attention(case: Case) -> Callable[[], Any]:
    q, k, v, lengths = case.arguments
    # It wants [B, S, K, H]. A cache for it would be stored in this order, so the transpose is not
    # part of the measurement.
    k, v = (jax.block_until_ready(jnp.swapaxes(x, 1, 2)) for x in (k, v))

    @jax.jit
    def run(q, k, v, lengths):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return jax.nn.dot_product_attention(q[:, None], k, v, key_value_seq_lengths=lengths)

    return lambda: run(q, k, v, lengths)


PAGE = {"tpu": 64, "gpu": 16}
"""Rows of a page, on the platforms that have jax's paged attention."""


def optional_baselines(
    case: Case, platform: str
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Compiled functions by name, and for those that cannot serve the case the reason."""
    runs: dict[str, Callable[[], Any]] = {}
    absent: dict[str, str] = {}
    if case.operation != "gqa_decode" or isinstance(case.arguments[1], Quantized):
        return runs, absent
    for name, prepare in {"jax paged": paged, "tokamax": tokamax}.items():
        try:
            run, *arguments = prepare(platform, *case.arguments)
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
                compiled = jax.jit(run).lower(*arguments).compile()
        except ModuleNotFoundError as error:
            absent[name] = f"not installed ({error.name})"
        except Exception as error:  # each package refuses with exceptions of other types
            absent[name] = (str(error) or type(error).__name__).splitlines()[0]
        else:
            runs[name] = lambda compiled=compiled, arguments=arguments: compiled(*arguments)
    return runs, absent


def paged(platform: str, q, k, v, lengths) -> tuple[Any, ...]:
    """jax's paged attention over pages in order, and its arguments.

    It does not scale logits, which does not change the time.
    """
    if platform not in PAGE:
        raise NotImplementedError(f"not on this backend ({platform})")
    module = importlib.import_module(f"jax.experimental.pallas.ops.{platform}.paged_attention")
    (B, K, S, H), size = k.shape, PAGE[platform]
    if S % size:
        raise NotImplementedError(f"{S} slots are not a multiple of the page size {size}")
    pages = S // size
    table = jnp.arange(B * pages, dtype=jnp.int32).reshape(B, pages)
    if platform == "tpu":
        settings = {"page_indices": table, "pages_per_compute_block": math.gcd(pages, 8)}
    else:
        splits = math.gcd(pages, 16)
        at_once = math.gcd(pages // splits, 8)
        settings = {"block_tables": table, "k_splits": splits, "pages_per_compute_block": at_once}

    def run(q, k, v, lengths):
        return module.paged_attention(q, k, v, lengths=lengths, **settings)

    k, v = (jnp.swapaxes(x, 0, 1).reshape(K, B * pages, size, H) for x in (k, v))
    return run, q, k, v, lengths


def tokamax(platform: str, q, k, v, lengths) -> tuple[Any, ...]:
    """Tokamax's attention, whose caches are [B, S, K, H], and its arguments."""
    attention = importlib.import_module("tokamax").dot_product_attention
    if platform == "cpu":
        raise NotImplementedError(f"not on this backend ({platform})")

    def run(q, k, v, lengths):
        return attention(q[:, None], k, v, key_value_seq_lengths=lengths)

    return run, q, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), lengths
