"""Why the TPU kernels cannot serve a call, and how large their pieces are.

The functions with the operations' names check a whole call and give a sentence for people, or None.
`kind` is the device kind, `sizes` come from `tables.sizes`, and arrays may be
`jax.ShapeDtypeStruct`s. Nothing here imports Pallas: any process can ask.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.entries import Entries, Quantized, Segments
from pallas_kernels.plan import Operands

OLD_KINDS = ("TPU v2", "TPU v3", "TPU v4")
QUERIES = (jnp.float32, jnp.bfloat16)
ENTRIES = (*QUERIES, jnp.int8, jnp.float8_e4m3fn)
LANES = 128
"""Columns of a tile of vector memory."""
MIB = 2**20
VMEM = {"TPU v5 lite": 16 * MIB, "TPU v5": 16 * MIB}
"""Bytes of vector memory that the compiler gives a kernel by default: the limit that libtpu names
when a kernel is too large."""
NEWER_VMEM = 32 * MIB
INTERNAL = MIB // 8
"""Bytes of that which the compiler uses itself."""
SMEM = MIB - 2**14
"""Bytes of scalar memory, less those that the compiler uses: lists of 258,048 pieces compile, and
lists of 261,120 do not, on every kind."""


def gqa_decode(kind: str, sizes: dict[str, int], q: Any, k: Entries, v: Entries) -> str | None:
    """Why `gqa_decode` cannot serve."""
    (B, N, H), (K, S) = q.shape, k.shape[1:3]
    size, heads = dense_tiles(k, v, sizes["block"], sizes["piece_bytes"])
    # The operands as one grid step sees them: one piece.
    queries = _shape((heads, N // K, H), q.dtype)
    x = Operands.of((queries,), (_block(k, heads, size),), _block(v, heads, size))
    U = B * K // heads
    lists = U * -(-S // size), U
    return arrays(kind, [q], [k, v]) or memory(kind, x, sizes["shares"], *lists)


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
    (B, N, H), P, K = q.shape, k_pool.shape[1], segments.num_heads
    size = block_size(P, sizes["block"])
    rows = row_span(P, size)
    live = None if live is None else (_shape((1, rows), jnp.int32), _shape((B,), jnp.int32))
    blocks = (_block(pool, 1, size, rows) for pool in (k_pool, v_pool))
    x = Operands.of((_shape((1, N // K, H), q.dtype),), (next(blocks),), next(blocks), live)
    lists = B * segments.most_blocks(P, size), B * K
    return (
        arrays(kind, [q], [k_pool, v_pool])
        or starts(segments, k_pool, v_pool)
        or memory(kind, x, sizes["shares"], *lists)
    )


def mla_decode(
    kind: str, sizes: dict[str, int], q_latent: Any, q_rope: Any, latent: Entries, k_rope: Entries
) -> str | None:
    """Why `mla_decode` cannot serve."""
    (B, N, L), S, R = q_latent.shape, latent.shape[1], q_rope.shape[2]
    size, parts = min(sizes["block"], S), 1 if R == 0 else 2
    queries = _shape((1, N, L), q_latent.dtype), _shape((1, N, R), q_rope.dtype)
    keys = _block(latent, 1, size), _block(k_rope, 1, size)
    x = Operands.of(queries[:parts], keys[:parts], None)
    lists = B * -(-S // size), B
    found = arrays(kind, [q_latent, q_rope], [latent, k_rope][:parts])
    return found or memory(kind, x, sizes["shares"], *lists)


def arrays(kind: str, queries: list[Any], entries: list[Any]) -> str | None:
    """Checks the device, and the dtypes and widths of the arrays."""
    if kind in OLD_KINDS:
        return f"the compiler refuses it for {kind}"
    dtypes = [*((x.dtype, QUERIES) for x in queries), *((x.dtype, ENTRIES) for x in entries)]
    if any(jnp.dtype(dtype) == jnp.float16 for dtype, _ in dtypes):
        return "TPUs have no float16"
    for dtype, known in dtypes:
        if jnp.dtype(dtype) not in map(jnp.dtype, known):
            what, names = "queries" if known is QUERIES else "entries", map(jnp.dtype, known)
            return f"got {what} of {dtype}, expected {', '.join(str(name) for name in names)}"
    if any(x.shape[-1] == 0 for x in entries):
        return "got entries of width 0"
    return None


def starts(segments: Segments, *pools: Any) -> str | None:
    """Checks that segments start at whole DMA tiles; the pool with the narrowest dtype decides."""
    align = segments.alignment(pools[0].shape[1])
    dtype = max((pool.dtype for pool in pools), key=tile_rows)
    rows = tile_rows(dtype)
    if align % rows == 0:
        return None
    return f"segments start at multiples of {align} rows, and {dtype} needs {rows}"


def memory(kind: str, x: Operands, shares: int, pieces: int, segments: int) -> str | None:
    """Checks the work list against scalar memory, and a piece against vector memory.

    Args:
        x: the blocks that a grid step reads.
        pieces, segments: lengths of the work list.
    """
    needed, room = smem_bytes(pieces, segments), SMEM
    needed += 0 if x.than is None else 4 * x.than.shape[0]
    if needed > room:
        return (
            f"the work list has {pieces} pieces of {segments} segments, {needed} bytes, and scalar "
            f"memory holds {room}"
        )
    out_dtype = x.queries[0].dtype if shares == 1 else jnp.float32
    needed, room = vmem_bytes(x, out_dtype), VMEM.get(kind, NEWER_VMEM)
    if needed > room:
        return f"a piece needs {needed / MIB:.1f} MiB of vector memory, and {room // MIB} are given"
    return None


def vmem_bytes(x: Operands, out_dtype: Any) -> int:
    """Bytes of vector memory that a grid step needs.

    The sum has the blocks, the state, and the copies that the compiler makes: entries widened to
    the queries' dtype, values with their dead rows zeroed, and weights. Sizes that the compiler
    names for kernels that are too large are between three quarters of this and all of it.

    Args:
        x: the blocks that a step reads: queries [C, G, X], entries [C, rows, X], numbers of rows
            [C, rows].
    """
    dtype, (C, G, _) = x.queries[0].dtype, x.queries[0].shape
    out = C, G, x.values.shape[2]
    # Blocks that are copied have two buffers: the next step's arrive while this step computes.
    moved = sum(_padded(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(x._replace(than=None)))
    moved += _padded(out, out_dtype) + _padded(out[:2], jnp.float32)
    state = _padded(out, jnp.float32) + 2 * _padded((C, G, 1), jnp.float32)
    widened = [e.shape for e in x.entries if e.dtype != dtype]
    masked = [x.values.shape] if x.values.dtype == dtype else []
    copies = sum(_padded(shape, dtype) for shape in (*widened, *masked))
    copies += _padded((C, G, x.values.shape[1]), jnp.float32)
    return 2 * moved + state + copies + INTERNAL


def _padded(shape: tuple[int, ...], dtype: Any) -> int:
    """Bytes of an array in vector memory, in whole tiles; a single row is not padded to a tile."""
    *outer, rows, lanes = shape
    tile = tile_rows(dtype)
    rows = rows if rows == 1 else -(-rows // tile) * tile
    lanes = -(-lanes // LANES) * LANES
    return math.prod(outer) * rows * lanes * jnp.dtype(dtype).itemsize


def smem_bytes(pieces: int, segments: int) -> int:
    """Bytes of a work list: an int32 for each piece, four for each segment, and two bounds."""
    return 4 * (pieces + 4 * segments + 2)


def _shape(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _block(entries: Any, heads: int, size: int, scales: int | None = None) -> Any:
    """The block [heads, size, X] of entries that a piece reads, with `scales` scales a head."""
    values = _shape((heads, size, entries.shape[-1]), entries.dtype)
    if not isinstance(entries, Quantized):
        return values
    return Quantized(values, _shape((heads, scales or size), jnp.float32))


def dense_tiles(k: Entries, v: Entries, block: int, piece_bytes: int) -> tuple[int, int]:
    """Slots and KV heads of a piece of dense caches [B, K, S, ·], about `piece_bytes` large."""
    size = min(block, k.shape[2])
    row = sum(x.shape[3] * jnp.dtype(x.dtype).itemsize for x in (k, v))
    return size, heads_of_piece(k.shape[1], size * row, piece_bytes)


def block_size(pool_rows: int, block: int) -> int:
    """Rows of a piece of a pool: a multiple of 128, or the whole pool if that is smaller."""
    fits = min(block, pool_rows) // LANES * LANES
    return fits if fits else pool_rows


def row_span(pool_rows: int, size: int) -> int:
    """Numbers of rows that a piece of a pool reads: up to 128 more than it has rows.

    The first one is a multiple of 128, at or before the piece's first row.
    """
    return pool_rows if size == pool_rows else size + LANES


def padded_rows(pool_rows: int, size: int) -> int:
    """Width that arrays [B, 1, P] of row numbers must have: whole lanes, at least `row_span`."""
    if size == pool_rows:
        return pool_rows
    return max(-(-pool_rows // LANES) * LANES, row_span(pool_rows, size))


def heads_of_piece(num_heads: int, bytes_per_head: int, piece_bytes: int) -> int:
    """The largest divisor of the KV heads whose blocks fit into `piece_bytes`; at least 1."""
    fits = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
    return max((n for n in fits if n * bytes_per_head <= piece_bytes), default=1)


def tile_rows(dtype: Any) -> int:
    """Rows of a DMA tile: 8 for 4-byte entries, 16 for 2-byte and 32 for 1-byte entries."""
    return 32 // jnp.dtype(dtype).itemsize
