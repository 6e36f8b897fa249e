"""What the TPU kernels cannot serve, as a reason for people, or None."""

from typing import Any

import jax.numpy as jnp

from pallas_kernels.segments import Segments, common_alignment

OLD_KINDS = ("TPU v2", "TPU v3", "TPU v4")


def tile_rows(dtype: Any) -> int:
    """Rows of a DMA tile: 8 of 4-byte entries, 16 of 2-byte and 32 of 1-byte ones."""
    return 32 // jnp.dtype(dtype).itemsize


def arrays(device_kind: str, *arrays: Any) -> str | None:
    """Devices that the kernel does not compile for, and arrays or `Quantized` of a wrong dtype."""
    if device_kind in OLD_KINDS:
        return f"the compiler refuses it for {device_kind}"
    halves = any(jnp.dtype(x.dtype) == jnp.float16 for x in arrays)
    return "TPUs have no float16" if halves else None


def segments(segments: Segments, pool: Any) -> str | None:
    """Segments that do not start at whole DMA tiles."""
    rows, align = tile_rows(pool.dtype), common_alignment(segments, pool)
    if align % rows == 0:
        return None
    return f"segments start at multiples of {align} rows, and {pool.dtype} needs {rows}"
