"""What every converted checkpoint gets and tells: companion files, cache bytes a token."""

from __future__ import annotations

import jax

from kvjax.hf.companions import copy_companions

__all__ = ["bytes_per_token", "copy_companions"]


def bytes_per_token(model, dtype: str) -> int:
    """Cache bytes that one more token of one sequence costs, over all layers."""

    def total(length: int) -> int:
        cache = jax.eval_shape(lambda: model.init_cache(1, length, dtype))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))

    return total(2) - total(1)
