"""The plan of one decode step: which blocks a kernel reads, in which order, and how results merge.

A grid over (segment, block) would spend steps on blocks past the end of a short segment. The work
list names the blocks with live rows only, so that a kernel's time follows the live entries.

Words of the kernels:
    row: the place of one token's entries, in a cache or in a pool.
    segment: consecutive rows that the same queries read: a sequence's slots, or one head's rows.
    live: rows that hold entries which the query may see; all others are dead and may hold NaN.
    block, piece: `block` consecutive rows of a segment; a piece of work is one block.
    share: an equal part of the work list, for one core of a TPU or one thread block of a GPU.
    lse: logsumexp of a query's logits, with which results over disjoint rows are merged.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.entries import NEG_INF, Quantized

COMPARED = 2**20
"""Segments times pieces up to which a TPU compares all of them faster than it runs the loop of a
binary search (XLA's estimate for 512 × 2048: 8,400 cycles)."""


class WorkList(NamedTuple):
    """The blocks with live rows of U segments, segment after segment; int32 arrays.

    Attributes:
        bounds: [2] the number of pieces, and the number of pieces in a share.
        owners: [W] the segment of each piece; or [shares + 1] the segment of each share's first
            piece, and of the piece after the list. Past the list's end: the last segment.
        firsts: [U] the number of each segment's first piece.
        starts: [U] the first row of each segment in the array that holds it.
        begins, ends: [U] the first live row of each segment and the one after the last, counted
            from the segment's start.
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
    """The work list of segments: Σ ceil(length / block) pieces without a window.

    Args:
        starts, lengths: first row and number of live rows of each segment.
        block: rows of a piece.
        most: W, an upper bound on the number of pieces, which gives `owners` [W]. None gives
            `owners` [shares + 1].
        window: only the last `window` rows of each segment are live; default all.
        shares: number of equal parts of the list.
    """
    begins = jnp.zeros_like(lengths) if window is None else jnp.maximum(lengths - window, 0)
    pieces = count_pieces(begins, lengths, block)
    upto = jnp.cumsum(pieces, dtype=jnp.int32)
    count = upto[-1]
    per_share = jnp.maximum(-(-count // shares), 1)
    # Pieces whose segment is looked up: the first of each share, or every piece.
    if most is None:
        numbers = jnp.arange(shares + 1, dtype=jnp.int32) * per_share
    else:
        numbers = jnp.arange(most, dtype=jnp.int32)
        # If the caller's bound is wrong the last segments lose rows, but no kernel reads behind
        # the end of the list.
        count = jnp.minimum(count, most)
        per_share = jnp.minimum(per_share, -(-most // shares))
    # The owner of a piece is the first segment whose pieces end after it: segments without pieces
    # are skipped.
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


class Operands(NamedTuple):
    """What a kernel reads: arrays, refs inside of the kernel, or shapes where limits are checked.

    Attributes:
        queries: a tuple of arrays [·, X]. The logits are the sum of their products with the keys.
        keys: a tuple of arrays [·, rows, X], one for each array of queries.
        own_values: [·, rows, Y]; None for latent attention, whose first keys are the values.
        key_scales: a tuple of [·, rows] fp32 scales, or of None for keys that are not quantized.
        own_value_scale: the scale of `own_values`; None where they are not quantized, or None.
        positions: [·, rows] int32 positions of the rows' tokens; None: every row is visible.
        than: [·] int32, for each array: rows with a larger position are visible.
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
        """Operands of entries, which may be `Quantized`.

        Args:
            values: None where the first keys are the values.
            live: the pair (positions, than); None: every row is visible.
        """
        positions, than = (None, None) if live is None else live
        parts = [_numbers_and_scales(x) for x in keys]
        own_values, own_value_scale = _numbers_and_scales(values)
        key_arrays, key_scales = (tuple(part[i] for part in parts) for i in (0, 1))
        scales = key_scales, own_value_scale
        return cls(queries, key_arrays, own_values, *scales, positions, than)

    @property
    def values(self) -> Any:
        """The values, whether they have an array to themselves or are the first keys."""
        return self.keys[0] if self.own_values is None else self.own_values

    @property
    def value_scale(self) -> Any:
        """The scales of `values`; None where they are not quantized."""
        return self.key_scales[0] if self.own_values is None else self.own_value_scale

    @property
    def entries(self) -> list[Any]:
        """The arrays of keys and values, each once."""
        return [*self.keys, *([] if self.own_values is None else [self.own_values])]

    @property
    def per_row(self) -> list[Any]:
        """The arrays that have one number for each row: scales and positions."""
        rows = (*self.key_scales, self.own_value_scale, self.positions)
        return [row for row in rows if row is not None]


def _numbers_and_scales(entries: Any) -> tuple[Any, Any]:
    """The entries' numbers and their scales."""
    if isinstance(entries, Quantized):
        return entries.values, entries.scale
    return entries, None


def touched(work: WorkList, block: int, shares: int) -> Bool[Array, "shares U"]:
    """Whether a share has pieces of a segment."""
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
    """Merges the shares' partial results for each segment.

    A kernel writes no result for segments that a share does not touch: that memory can hold NaN, so
    it is replaced before it is used.
    """
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
    """(out, lse) of attention over two disjoint sets of keys, from the (out, lse) of each; fp32.

    A set without live keys has lse −1e30 and weight 0.
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
    """Merges results over keys that several devices hold, under `jax.shard_map`.

    Before, each device has the results of all heads over its own keys. After, each device has the
    results of N / devices heads over all keys.

    Args:
        out, lse: [..., N, ..., H] and [..., N, ...].
        mesh_axis: the mesh axis whose devices hold disjoint sets of keys.
        axis: the axis of the N heads.

    Returns:
        out of this device's heads, fp32.
    """
    # One array, so that one all-to-all moves both.
    both = jnp.concatenate([out.astype(jnp.float32), lse[..., None]], axis=-1)
    parts = jax.lax.all_to_all(both[None], mesh_axis, axis + 1, 0, tiled=True)
    out, lse = parts[..., :-1], parts[..., -1]
    weight = jnp.exp(lse - jnp.max(lse, axis=0, keepdims=True))
    return jnp.sum(out * weight[..., None], axis=0) / jnp.sum(weight, axis=0)[..., None]
