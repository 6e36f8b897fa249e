"""A flat list of equal pieces of work, so that a kernel's time follows the live entries.

Segments (the slots of a sequence, the rows of a head) differ in length; a grid over (segment,
block) would spend steps on blocks beyond their ends. The list names the live blocks only, one
after the other, and a share of it is a share of the bytes, whatever the segments are.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.quantized import Quantized
from pallas_kernels.reference import NEG_INF

COMPARED = 2**20
"""Segments times pieces up to which comparing all of them costs a TPU less than a binary search,
which is a loop (XLA's estimate: 8,400 cycles at 512 × 2048)."""


class WorkList(NamedTuple):
    """The blocks that hold live rows of U segments, in order.

    Attributes:
        bounds: [2] int32, the number of pieces, and how many of them a share has.
        owners: int32, the segment of each piece [W], or of the first piece of each share and of
            the one after the last [shares + 1]; beyond the list the last segment.
        firsts: [U] int32, number of each segment's first piece.
        starts: [U] int32, where each segment starts in the array that holds it.
        begins, ends: [U] int32, live rows of each segment, counted from its start.
    """

    bounds: Int[Array, "2"]
    owners: Int[Array, " W"]
    firsts: Int[Array, " U"]
    starts: Int[Array, " U"]
    begins: Int[Array, " U"]
    ends: Int[Array, " U"]


def flatten(
    starts: Int[Array, " U"],
    lengths: Int[Array, " U"],
    block: int,
    most: int | None = None,
    window: int | None = None,
    shares: int = 1,
) -> WorkList:
    """Blocks of `block` rows that hold live rows: Σ ceil(length / block) without a window.

    Args:
        starts, lengths: first row and number of live rows of each segment.
        most: W, the number of pieces that can occur; None: owners are those of the shares.
        window: only the last `window` live rows are seen.
        shares: the list is cut into so many shares.
    """
    begins = jnp.zeros_like(lengths) if window is None else jnp.maximum(lengths - window, 0)
    pieces = count_pieces(begins, lengths, block)
    upto = jnp.cumsum(pieces, dtype=jnp.int32)
    count = upto[-1]
    per_share = jnp.maximum(-(-count // shares), 1)
    if most is None:
        numbers = jnp.arange(shares + 1, dtype=jnp.int32) * per_share
    else:
        numbers = jnp.arange(most, dtype=jnp.int32)
        # Segments beyond a wrong bound lose their last rows; no kernel reads beyond the list.
        count = jnp.minimum(count, most)
        per_share = jnp.minimum(per_share, -(-most // shares))
    method = "compare_all" if upto.shape[0] * numbers.shape[0] <= COMPARED else "scan"
    owners = jnp.searchsorted(upto, numbers, side="right", method=method).astype(jnp.int32)
    owners = jnp.minimum(owners, lengths.shape[0] - 1)
    bounds = jnp.stack([count, per_share])
    return WorkList(bounds, owners, upto - pieces, starts, begins, lengths)


def count_pieces(begin: jax.Array, end: jax.Array, block: int) -> jax.Array:
    """Number of blocks that hold rows begin … end − 1 of a segment.

    `pl.cdiv` would make an int64 of `block` under jax_enable_x64, which `lax.div` refuses.
    """
    return -(-end // block) - begin // block


def touched(work: WorkList, block: int, shares: int) -> Bool[Array, "shares U"]:
    """Which shares have pieces of which segments."""
    pieces = count_pieces(work.begins, work.ends, block)
    start = jnp.arange(shares, dtype=jnp.int32)[:, None] * work.bounds[1]
    low = jnp.maximum(start, work.firsts[None])
    return low < jnp.minimum(start + work.bounds[1], (work.firsts + pieces)[None])


def combine(
    out: Float[Array, "shares U C G Y"],
    lse: Float[Array, "shares U C G"],
    work: WorkList,
    block: int,
) -> tuple[Float[Array, "U C G Y"], Float[Array, "U C G"]]:
    """Merges the shares' partial results; what a share never touched was never written."""
    written = touched(work, block, out.shape[0])[:, :, None, None]
    lse = jnp.where(written, lse, NEG_INF)
    out = jnp.where(written[..., None], out, jnp.zeros((), out.dtype))
    total = out[0], lse[0]
    for share in range(1, out.shape[0]):
        total = merge(total, (out[share], lse[share]))
    return total


def merge(
    a: tuple[Float[Array, "*B H"], Float[Array, "*B"]],
    b: tuple[Float[Array, "*B H"], Float[Array, "*B"]],
) -> tuple[jax.Array, jax.Array]:
    """(out, lse) of attention over both sets of keys, from the (out, lse) of each, all fp32.

    A set without live keys has lse −1e30 and counts for nothing.
    """
    (out_a, lse_a), (out_b, lse_b) = a, b
    top = jnp.maximum(lse_a, lse_b)
    weight_a, weight_b = jnp.exp(lse_a - top), jnp.exp(lse_b - top)
    total = weight_a + weight_b
    out = (out_a * weight_a[..., None] + out_b * weight_b[..., None]) / total[..., None]
    return out, top + jnp.log(total)


def exchange(
    out: Float[Array, "..."], lse: Float[Array, "..."], mesh_axis: str, axis: int
) -> Float[Array, "..."]:
    """Under `jax.shard_map`: results of all heads over each device's keys, to results of each
    device's heads over all keys. One all-to-all.

    Args:
        out, lse: [..., N, ..., H] and [..., N, ...].
        mesh_axis: whose devices hold disjoint sets of keys.
        axis: of the heads.

    Returns:
        out, fp32, of this device's N / devices heads.
    """
    both = jnp.concatenate([out.astype(jnp.float32), lse[..., None]], axis=-1)
    parts = jax.lax.all_to_all(both[None], mesh_axis, axis + 1, 0, tiled=True)
    out, lse = parts[..., :-1], parts[..., -1]
    weight = jnp.exp(lse - jnp.max(lse, axis=0, keepdims=True))
    return jnp.sum(out * weight[..., None], axis=0) / jnp.sum(weight, axis=0)[..., None]


class Operands(NamedTuple):
    """The arrays that a kernel reads; refs inside of the kernel.

    Attributes:
        queries: a tuple of arrays [·, X], whose logits with the keys are summed.
        keys: a tuple of arrays [·, rows, X], one for each of the queries.
        own_values: [·, rows, Y]; None where the first of the keys serve as values too (MLA).
        key_scales: a tuple of [·, rows] fp32, or of None for keys that are not quantized.
        own_value_scale: likewise for `own_values`.
        positions: [·, rows] int32; None: all rows are visible.
        than: [·] int32, rows of this array are visible where their position is larger.
    """

    queries: Any
    keys: Any
    own_values: Any
    key_scales: Any
    own_value_scale: Any
    positions: Any
    than: Any

    @classmethod
    def of(
        cls, queries: tuple[Any, ...], keys: tuple[Any, ...], values: Any, live: Any = None
    ) -> "Operands":
        """Takes entries apart into values and scales; shapes serve as well as arrays.

        Args:
            values: None where the first of the keys serve as values too.
            live: the pair of positions and `than`; None: all rows are visible.
        """
        positions, than = (None, None) if live is None else live
        parts = [_split(x) for x in keys]
        own_values, own_value_scale = _split(values)
        key_arrays, key_scales = (tuple(part[i] for part in parts) for i in (0, 1))
        scales = key_scales, own_value_scale
        return cls(queries, key_arrays, own_values, *scales, positions, than)

    @property
    def values(self) -> Any:
        """The array that the weights are multiplied with."""
        return self.keys[0] if self.own_values is None else self.own_values

    @property
    def value_scale(self) -> Any:
        """The scales of `values`; None where they are not quantized."""
        return self.key_scales[0] if self.own_values is None else self.own_value_scale

    @property
    def entries(self) -> list[Any]:
        """Every array of keys or values, once."""
        return [*self.keys, *([] if self.own_values is None else [self.own_values])]

    @property
    def per_row(self) -> list[Any]:
        """Every array with a number for each row: scales and positions."""
        rows = (*self.key_scales, self.own_value_scale, self.positions)
        return [row for row in rows if row is not None]


def _split(entries: Any) -> tuple[Any, Any]:
    if isinstance(entries, Quantized):
        return entries.values, entries.scale
    return entries, None
