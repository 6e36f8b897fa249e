"""What the TPU kernels cannot serve, as a reason for people, or None.

The functions with the operations' names say all there is to say of a call; `sizes` are those of
`tuning.sizes`. Arrays may be `jax.ShapeDtypeStruct`s.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.operands import Operands, operands
from pallas_kernels.quantized import Entries, Quantized
from pallas_kernels.segments import Segments
from pallas_kernels.tpu.memory import (
    MIB,
    NEWER_VMEM,
    SMEM,
    VMEM,
    smem_bytes,
    tile_rows,
    vmem_bytes,
)
from pallas_kernels.tpu.tiles import block_size, dense_tiles, row_window

OLD_KINDS = ("TPU v2", "TPU v3", "TPU v4")
QUERIES = (jnp.float32, jnp.bfloat16)
ENTRIES = (*QUERIES, jnp.int8, jnp.float8_e4m3fn)


def gqa_decode(kind: str, sizes: dict[str, int], q: Any, k: Entries, v: Entries) -> str | None:
    """Why `gqa_decode` cannot serve."""
    (B, N, H), (K, S) = q.shape, k.shape[1:3]
    size, heads = dense_tiles(k, v, sizes["block"], sizes["piece_bytes"])
    queries = _shape((heads, N // K, H), q.dtype)
    x = operands((queries,), (_block(k, heads, size),), _block(v, heads, size))
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
    rows = row_window(P, size)
    seen = None if live is None else _shape((1, rows), jnp.float32)
    blocks = (_block(pool, 1, size, rows) for pool in (k_pool, v_pool))
    x = operands((_shape((1, N // K, H), q.dtype),), (next(blocks),), next(blocks), seen)
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
    x = operands(queries[:parts], keys[:parts], None)
    lists = B * -(-S // size), B
    found = arrays(kind, [q_latent, q_rope], [latent, k_rope][:parts])
    return found or memory(kind, x, sizes["shares"], *lists)


def arrays(kind: str, queries: list[Any], entries: list[Any]) -> str | None:
    """Devices that the kernel does not compile for, and dtypes that it does not know."""
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
    """Segments that do not start at whole DMA tiles."""
    align = segments.alignment(pools[0].shape[1])
    dtype = max((pool.dtype for pool in pools), key=tile_rows)
    rows = tile_rows(dtype)
    if align % rows == 0:
        return None
    return f"segments start at multiples of {align} rows, and {dtype} needs {rows}"


def memory(kind: str, x: Operands, shares: int, pieces: int, segments: int) -> str | None:
    """Blocks beyond vector memory, and work lists beyond scalar memory."""
    needed, room = smem_bytes(pieces, segments), SMEM
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


def _shape(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _block(entries: Any, heads: int, size: int, scales: int | None = None) -> Any:
    """The block [heads, size, X] of entries that a piece reads, with `scales` scales a head."""
    values = _shape((heads, size, entries.shape[-1]), entries.dtype)
    if not isinstance(entries, Quantized):
        return values
    return Quantized(values, _shape((heads, scales or size), jnp.float32))
