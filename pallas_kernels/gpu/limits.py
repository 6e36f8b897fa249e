"""What the GPU kernels cannot serve, as a reason for people, or None."""

from typing import Any

import jax.numpy as jnp

from pallas_kernels.quantized import Entries, is_quantized
from pallas_kernels.segments import Segments, common_alignment

HOPPER = ("H100", "H200", "H800", "H20", "GH200")
TILE = 8
WIDEST = 512


def arrays(device_kind: str, q: Any, keys: list[Entries], values: Entries) -> str | None:
    """Devices without Hopper's instructions, dtypes, and shapes that do not fill its tiles.

    Args:
        keys: [·, rows, X] each.
        values: [·, rows, Y].
    """
    if not any(name in device_kind for name in HOPPER):
        return f"it needs Hopper's instructions, which {device_kind} does not have"
    if jnp.dtype(q.dtype).itemsize != 2:
        return f"tensor cores take queries of 16 bits, got {q.dtype}"
    mixed = {x.dtype for x in (*keys, values)} - {q.dtype}
    if any(not is_quantized(dtype) for dtype in mixed) or len(mixed) > 1:
        return f"queries are {q.dtype}, entries {', '.join(str(x.dtype) for x in keys)}"
    widths = [x.shape[-1] for x in (*keys, values)]
    step = 32 if mixed else 16
    if any(width % step for width in widths):
        return f"head dims are {widths}, expected multiples of {step}"
    if sum(widths[:-1]) > WIDEST + 128 or widths[-1] > WIDEST:
        return f"head dims are {widths}, more than shared memory or registers hold"
    if keys[0].shape[-2] % TILE:
        return f"{keys[0].shape[-2]} slots are no multiple of {TILE}"
    return None


def segments(segments: Segments, pool: Any) -> str | None:
    """Segments that do not start at whole tiles."""
    align = common_alignment(segments, pool)
    if align % TILE == 0:
        return None
    return f"segments start at multiples of {align} rows, expected of {TILE}"
