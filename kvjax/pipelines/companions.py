"""What every converted checkpoint gets or tells: companion files, cache bytes a token, memory."""

from __future__ import annotations

import ctypes
import resource
import sys

import jax

from kvjax.hf.save import copy_companions

__all__ = ["bytes_per_token", "copy_companions", "peak_memory", "trim_memory"]


def bytes_per_token(model, dtype: str) -> int:
    """Cache bytes that one more token of one sequence costs, over all layers."""

    def total(length: int) -> int:
        cache = jax.eval_shape(lambda: model.init_cache(1, length, dtype))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))

    return total(2) - total(1)


def peak_memory() -> int:
    """The process's peak resident set, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def trim_memory() -> None:
    """Gives memory that was freed back to the system, where the C library has a call for that.

    glibc keeps arrays of a few MB in pools of each thread, which grow by some 50 MB with every
    layer of a 14B model that is converted.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
