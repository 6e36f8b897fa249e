"""Why the GPU kernels cannot serve a call, as a sentence for people; None where they can.

The functions with the operations' names check a whole call. `kind` is the device kind, `sizes` come
from `tables.sizes`, and arrays may be `jax.ShapeDtypeStruct`s. Nothing here imports Pallas: any
process can ask.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.entries import Entries, Segments
from pallas_kernels.plan import Operands

HOPPER = ("H100", "H200", "H800", "H20", "GH200")
QUERIES = (jnp.bfloat16, jnp.float16)
EIGHT_BITS = (jnp.int8, jnp.float8_e4m3fn)
TILE = 8
"""Rows of a tile in shared memory; copies start, and arrays end, at multiples of it."""
WIDEST_KEYS, WIDEST_VALUES = 640, 512
"""Columns; the accumulators of wider values do not fit into the registers of two warpgroups."""
ROWS = 64
"""Rows of queries in a tensor core product; fewer queries are padded."""
BLOCK = 64
"""Rows of a piece, the rows of a register tile: values pass through one when they are cleaned."""
ALIGNMENT = 1024
"""Bytes; arrays in shared memory start at multiples of it."""
SHARED_MEMORY = 232448 - ALIGNMENT
"""Bytes for the arrays of a thread block on Hopper: 227 KiB (CUDA's programming guide, compute
capability 9.0), less room for barriers and alignment."""


def gqa_decode(kind: str, sizes: dict[str, int], q: Any, k: Entries, v: Entries) -> str | None:
    """Why `gqa_decode` cannot serve."""
    return arrays(kind, Operands.of((q,), (k,), v), k.shape[2])


def ragged_gqa_decode(
    kind: str,
    sizes: dict[str, int],
    q: Any,
    k_pool: Any,
    v_pool: Any,
    segments: Segments,
    live: Any,
) -> str | None:
    """Why `ragged_gqa_decode` cannot serve."""
    rows = None if live is None else (jax.ShapeDtypeStruct(k_pool.shape[:2], jnp.int32), None)
    x = Operands.of((q,), (k_pool,), v_pool, rows)
    return arrays(kind, x, k_pool.shape[1]) or starts(segments, k_pool.shape[1])


def mla_decode(
    kind: str, sizes: dict[str, int], q_latent: Any, q_rope: Any, latent: Entries, k_rope: Entries
) -> str | None:
    """Why `mla_decode` cannot serve."""
    parts = 1 if q_rope.shape[2] == 0 else 2
    x = Operands.of((q_latent, q_rope)[:parts], (latent, k_rope)[:parts], None)
    return arrays(kind, x, latent.shape[1])


def arrays(kind: str, x: Operands, slots: int) -> str | None:
    """Checks the device, dtypes and shapes; `slots` is the number of rows of an array."""
    if not any(name in kind for name in HOPPER):
        return f"it needs Hopper's instructions, which {kind} does not have"
    return dtypes(x) or shapes(x, slots)


def dtypes(x: Operands) -> str | None:
    """Checks that queries have 16 bits, and that all entries have their dtype or one of 8 bits."""
    entries = x.entries
    q, found = x.queries[0].dtype, {entry.dtype for entry in entries}
    if q not in map(jnp.dtype, QUERIES) or any(other.dtype != q for other in x.queries):
        return f"tensor cores take queries of 16 bits, got {x.queries[0].dtype}"
    if len(found) > 1 or found.isdisjoint({q, *map(jnp.dtype, EIGHT_BITS)}):
        names = ", ".join(str(entry.dtype) for entry in entries)
        return f"queries are {q} and entries {names}, expected entries of {q} or of one 8-bit dtype"
    scales = (*x.key_scales, x.value_scale)
    if len({scale is None for scale in scales}) > 1:
        return "some entries have scales and others have none"
    return None


def shapes(x: Operands, slots: int) -> str | None:
    """Checks head dims and slots against tiles, registers and shared memory."""
    widths = [entry.shape[-1] for entry in x.entries]
    # A row of a tile has at least 32 bytes, the smallest swizzle.
    step = 16 if x.keys[0].dtype == x.queries[0].dtype else 32
    if any(width % step or width == 0 for width in widths):
        return f"head dims are {widths}, expected multiples of {step}"
    keys, values = sum(entry.shape[-1] for entry in x.keys), x.values.shape[-1]
    if keys > WIDEST_KEYS or values > WIDEST_VALUES:
        return f"head dims are {widths}, more than registers hold"
    if stages_that_fit(x) < 1:
        return f"head dims are {widths} of {x.keys[0].dtype}, more than shared memory holds"
    if slots % TILE:
        return f"{slots} slots are not a multiple of {TILE}"
    return None


def starts(segments: Segments, pool_rows: int) -> str | None:
    """Checks that segments start at whole tiles."""
    align = segments.alignment(pool_rows)
    if align % TILE == 0:
        return None
    return f"segments start at multiples of {align} rows, expected of {TILE}"


def stages_that_fit(x: Operands) -> int:
    """How many stages the ring can have in the shared memory that the other arrays leave.

    Below 1 the kernel cannot run. `gpu.scratch.scratch` makes the arrays that are counted here.
    """
    size = jnp.dtype(x.queries[0].dtype).itemsize
    widths = [entry.shape[-1] for entry in x.entries]
    # Weights, queries and `shrink`; numbers of rows are aligned one by one.
    fixed = ROWS * size * (BLOCK + sum(q.shape[-1] for q in x.queries)) + 4 * ROWS
    fixed += ALIGNMENT * len(x.per_row)
    if x.keys[0].dtype != x.queries[0].dtype:  # a widened copy of one block
        fixed += BLOCK * size * sum(widths)
    entry = jnp.dtype(x.keys[0].dtype).itemsize
    stage = BLOCK * (entry * sum(widths) + 4 * len(x.per_row))
    return max(SHARED_MEMORY - fixed, 0) // stage
