"""What else jax offers for the same work."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.bench.cases import Case, gqa_case
from pallas_kernels.quantized import Quantized


def baselines(case: Case) -> dict[str, Callable[[], Any]]:
    """Other functions that do the case's work."""
    if case.operation == "ragged_gqa_decode":
        return {"dense": _dense(case)}
    if case.operation == "gqa_decode" and not isinstance(case.arguments[1], Quantized):
        return {"jax.nn": _dot_product_attention(case)}
    return {}


def _dense(case: Case) -> Callable[[], Any]:
    """As many entries in a dense cache: what ragged budgets cost beside it."""
    dense = gqa_case(case.model, case.batch, case.context, case.dtype)
    run = jax.jit(dense.run)
    return lambda: run(*dense.arguments)


def _dot_product_attention(case: Case) -> Callable[[], Any]:
    q, k, v, lengths = case.arguments
    # It wants [B, S, K, H]; a cache of its own would be laid out so.
    k, v = (jax.block_until_ready(jnp.swapaxes(x, 1, 2)) for x in (k, v))

    @jax.jit
    def run(q, k, v, lengths):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return jax.nn.dot_product_attention(q[:, None], k, v, key_value_seq_lengths=lengths)

    return lambda: run(q, k, v, lengths)
