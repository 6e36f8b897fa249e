"""What the GPU kernel keeps in shared memory, in bytes, from shapes and dtypes alone."""

from typing import Any

import jax.numpy as jnp

from pallas_kernels.operands import Operands

ROWS = 64
"""Queries of a tensor core product, whether there are so many or not."""
BLOCK = 64
"""Rows of a piece: the rows of a register tile that values pass through when they are cleaned."""
ALIGNMENT = 1024
"""Bytes that arrays in shared memory are aligned to."""
SHARED_MEMORY = 232448 - ALIGNMENT
"""Bytes that a block of threads may have on Hopper (CUDA's programming guide, compute capability
9.0: 227 KiB), less what barriers and alignment take."""


def entries_of(x: Operands) -> list[Any]:
    """Keys and values."""
    return [*x.keys, *([] if x.values is None else [x.values])]


def rows_of(x: Operands) -> list[Any]:
    """What belongs to rows: scales and masks."""
    return [row for row in (*x.key_scales, x.value_scale, x.seen) if row is not None]


def stages_that_fit(x: Operands) -> int:
    """Stages of the ring beside all else in shared memory; without one the kernel cannot run."""
    size = jnp.dtype(x.queries[0].dtype).itemsize
    widths = [entry.shape[-1] for entry in entries_of(x)]
    fixed = ROWS * size * (BLOCK + sum(q.shape[-1] for q in x.queries)) + 4 * ROWS
    fixed += ALIGNMENT * len(rows_of(x))
    if x.keys[0].dtype != x.queries[0].dtype:
        fixed += BLOCK * size * sum(widths)
    entry = jnp.dtype(x.keys[0].dtype).itemsize
    stage = BLOCK * (entry * sum(widths) + 4 * len(rows_of(x)))
    return max(SHARED_MEMORY - fixed, 0) // stage
