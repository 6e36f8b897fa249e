"""A policy applied to one batch of prompts: the empty caches, and each layer's compression.

Budgets are data in these programs, whatever the heads keep. One program ranks tokens, for each
kind of layer and scorer. Another packs the kept tokens, for each kind of layer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from kvjax.cache import AttentionSpec, ModelCache, Pool, PrefillCache
from kvjax.cache.layers import new_pool
from kvjax.cache.pool import PoolRows, bucket_rows, least_steps, pool_alignment, pool_rows
from kvjax.cache.room import keep_all
from kvjax.cache.sharded import head_copies
from kvjax.cache.storage import room_bucket
from kvjax.config import ModelConfig
from kvjax.mesh import Placement, put_rows
from kvjax.policies.budgets import Adaptive, Sharing
from kvjax.policies.scorers import Scorer, SinksAndRecent
from kvjax.policies.selection import (
    LayerBudget,
    Ranking,
    compress_again,
    compress_heads,
    compress_tokens,
    rank_common,
    rank_heads,
)


@dataclass(frozen=True)
class Budgets:
    """The tokens that a policy keeps of one batch of prompts; on the host.

    Attributes:
        caps: [B, L, K] int32, tokens that each head keeps besides the recent ones.
        recent: [B] int32, number of last tokens, which are always kept.
        rooms: [B, L, K] int32, rows of each head for new tokens.
        rings: [B, L, K] bool, heads that overwrite older tokens when their room is used up.
        scorer: rates the tokens; None if all tokens are kept.
        sharing: how the heads of a layer share their caps; None if they do not.
        observed: number of last queries that the scorer sees.
        again: whether caches are compressed again while they grow.
        dtype: dtype of the entries; None for the dtype of the activations.
    """

    caps: Int[np.ndarray, "B L K"]
    recent: Int[np.ndarray, " B"]
    rooms: Int[np.ndarray, "B L K"]
    rings: Bool[np.ndarray, "B L K"]
    scorer: Scorer | None
    sharing: Sharing | None = None
    observed: int = 0
    again: bool = False
    dtype: str | None = None


@dataclass(frozen=True)
class LayerGroup:
    """Layers whose heads share a pool.

    Attributes:
        layers: numbers of the layers.
        widths: numbers of a key and of a value.
        windows: each layer's sliding window, None for none.
    """

    layers: tuple[int, ...]
    widths: tuple[int, int]
    windows: tuple[int | None, ...]


@dataclass(frozen=True, eq=False)
class Compression:
    """A policy applied to one batch of prompts.

    Attributes:
        config: configuration of the model.
        budgets: the tokens to keep.
        lengths: [B] lengths of the prompts.
        new_tokens: number of new tokens that the caches must have room for.
        dtype: dtype of the activations.
        placement: placement of the batch on a mesh; None for one device.
        groups, rows: for each pool its layers and its rows.
        slots: slots of each layer whose heads all keep the same tokens, see `layer_slots`.
    """

    config: ModelConfig
    budgets: Budgets
    lengths: Int[np.ndarray, " B"]
    new_tokens: int
    dtype: Any
    placement: Placement | None
    groups: tuple[LayerGroup, ...]
    rows: tuple[PoolRows, ...]
    slots: dict[int, int]

    @property
    def copies(self) -> int:
        """See `ShardedHeads`."""
        if self.placement is None or not self.groups:
            return 1
        return head_copies(self.budgets.caps.shape[2], self.placement.ways)

    def observer(self, layer: int) -> Any:
        """The scorer's `Observer` of a layer, which sees all queries of a prompt; None for none."""
        watching = getattr(self.budgets.scorer, "observer", None)
        return None if watching is None else watching(self.config.layers[layer].attention)

    @property
    def room(self) -> int:
        """Rows for new tokens."""
        return room_bucket(self.new_tokens)

    @property
    def rope_lengths(self) -> Int[np.ndarray, " B"]:
        """See `ModelCache`."""
        return self.lengths + np.int32(self.new_tokens)

    def take(self, rows: Int[np.ndarray, " b"]) -> Compression:
        """The same for some of the sequences, in caches of the same size."""
        b = self.budgets
        each = {name: getattr(b, name)[rows] for name in ("caps", "recent", "rooms", "rings")}
        budgets = dataclasses.replace(b, **each)
        # Keep the row count of the whole batch: the groups' caches are joined and share programs.
        firsts = tuple(part._replace(first=part.first[rows]) for part in self.rows)
        placement = (
            None if self.placement is None else Placement.create(self.placement.mesh, len(rows))
        )
        own = {"budgets": budgets, "lengths": self.lengths[rows], "rows": firsts}
        return dataclasses.replace(self, **own, placement=placement)

    def start(self, device: Any = None) -> ModelCache:
        """Caches without entries.

        Args:
            device: the sharding of the parameters; None on a mesh. jax compiles a second program
                for arrays that are not bound to a device, so these arrays are bound as well.
        """
        both = (self.lengths, self.rope_lengths)
        lengths, rope_lengths = put_rows(both, device, self.placement)
        places: list[tuple[int, int] | None] = [None] * self.config.num_layers
        pools = []
        # One pool for each group of layers; `places` says where to find a layer.
        for number, (group, rows) in enumerate(zip(self.groups, self.rows, strict=True)):
            for row, layer in enumerate(group.layers):
                places[layer] = number, row
            pools.append(self._empty_pool(group, rows, lengths))
        own = (None,) * self.config.num_layers
        return ModelCache(
            own, tuple(pools), rope_lengths, tuple(places), self.placement, self.copies
        )

    def _empty_pool(self, group: LayerGroup, rows: PoolRows, lengths: jax.Array) -> Pool:
        b, ways = self.budgets, 1 if self.placement is None else self.placement.ways
        heads = b.caps.shape[2] * self.copies
        align = alignment(b.dtype or self.dtype, self.placement)
        make = functools.partial(
            new_pool,
            (len(self.lengths), len(group.layers), heads),
            rows.rows * ways,
            group.widths,
            jnp.dtype(b.dtype or self.dtype).name,
            any(window is not None for window in group.windows),
            align,
            None if align == 1 else rows.span,
            self.placement,
        )
        pool = make(lengths)
        return dataclasses.replace(pool, queries=(None,) * len(group.layers)) if b.again else pool

    def compress(
        self,
        caches: ModelCache,
        layer: int,
        prefilled: PrefillCache,
        rankings: dict[Any, Ranking] | None = None,
    ) -> ModelCache:
        """The caches with the kept tokens of one layer's prompt added.

        Args:
            rankings: rankings of this prompt that earlier policies have made; a new one is added.
        """
        call, ranking = self.ranking(caches, layer, prefilled), None
        if call is not None:
            rankings = {} if rankings is None else rankings
            key = (call.func, call.args[1].tobytes(), *call.keywords.values())
            if key not in rankings:
                rankings[key] = call()
            ranking = rankings[key]
        packed, place = self.packing(caches, layer, prefilled, ranking)(), caches.places[layer]
        if place is None:
            return caches.with_layer(layer, packed)
        return caches.with_pool_layer(place, packed)

    def ranking(
        self, caches: ModelCache, layer: int, prefilled: PrefillCache
    ) -> functools.partial[Ranking] | None:
        """The call that ranks one layer's tokens: a program and its arguments, not yet run.

        None where all tokens stay. Of the budgets a ranking depends on `recent` alone.
        """
        b, spec = self.budgets, self.config.layers[layer].attention.spec
        common = caches.places[layer] is None
        if common and b.scorer is None:
            return None
        settings = {"scorer": b.scorer or SinksAndRecent(), "spec": spec, "observed": b.observed}
        arrays = prefilled, self.layer_recent(layer)
        if common:
            return functools.partial(rank_common, *arrays, **settings)
        return functools.partial(rank_heads, *arrays, **settings, placement=self.placement)

    def packing(
        self, caches: ModelCache, layer: int, prefilled: PrefillCache, ranking: Ranking | None
    ) -> functools.partial[Any]:
        """The call that compresses one layer's prompt: a program and its arguments, not yet run.

        Args:
            ranking: the result of the call that `Compression.ranking` returns.
        """
        place, spec = caches.places[layer], self.config.layers[layer].attention.spec
        # Without an observer's state, and without queries that no later compression reads, policies
        # that observe differently share this program.
        prefilled = prefilled.seen_by(None)
        if not self.budgets.again:
            prefilled = without_queries(prefilled)
        if place is None:
            return self._whole_layer(layer, prefilled, ranking, spec)
        number, row = place
        b = self.budgets
        return functools.partial(
            compress_heads,
            prefilled,
            ranking,
            caches.pools[number].layer(row),
            self.layer_budget(layer, number, row),
            # `compress_heads` traces sharing even if no budget uses it: no None here.
            sharing=b.sharing or Adaptive(),
            spec=spec,
            remembered=b.observed if b.again else 0,
            placement=self.placement,
            copies=self.copies,
        )

    def _whole_layer(
        self, layer: int, prefilled: PrefillCache, ranking: Ranking | None, spec: AttentionSpec
    ) -> functools.partial[Any]:
        """`packing` for a layer whose heads keep the same tokens: the whole prompt, or as many as
        the mean of the heads' budgets."""
        b = self.budgets
        if ranking is None:
            return functools.partial(keep_all, prefilled.base, self.room, b.dtype, spec)
        return functools.partial(
            compress_tokens,
            prefilled,
            ranking,
            common_caps(b, layer),
            self.layer_recent(layer),
            slots=self.slots[layer],
            spec=spec,
            dtype=b.dtype,
        )

    def again(self, caches: ModelCache) -> ModelCache:
        """The pools compressed again, after new tokens were added."""
        for layer, place in enumerate(caches.places):
            assert place is not None
            number, row = place
            b = self.budgets
            packed = compress_again(
                caches.pools[number].layer(row),
                self.layer_budget(layer, number, row),
                scorer=b.scorer or SinksAndRecent(),
                sharing=b.sharing or Adaptive(),
                spec=self.config.layers[layer].attention.spec,
                size=min(longest_segment(b), self.rows[number].rows),
                placement=self.placement,
                copies=self.copies,
            )
            caches = caches.with_pool_layer(place, packed)
        # Count from here: `kept` is the state at this length. `+ 0` gives each pool a separate
        # array.
        pools = tuple(dataclasses.replace(pool, read=pool.lengths + 0) for pool in caches.pools)
        return dataclasses.replace(caches, pools=pools)

    def layer_budget(self, layer: int, number: int, row: int) -> LayerBudget:
        """The budgets of one layer, as arrays."""
        b, sliding = self.budgets, self.config.layers[layer].attention.spec.window
        return LayerBudget(
            caps=b.caps[:, layer],
            recent=self.layer_recent(layer),
            rooms=np.repeat(b.rooms[:, layer], self.copies, axis=1).astype(np.int32),
            rings=np.repeat(b.rings[:, layer] | (sliding is not None), self.copies, axis=1),
            shared=np.bool_(b.sharing is not None),
            first=self.rows[number].first[:, row],
        )

    def layer_recent(self, layer: int) -> Int[np.ndarray, " B"]:
        """The last tokens that stay in one layer: at most its sliding window."""
        return recent_tokens(self.config, self.budgets, layer)


def compression(
    config: ModelConfig,
    budgets: Budgets,
    lengths: Sequence[int] | Int[np.ndarray, " B"],
    new_tokens: int,
    dtype: Any,
    placement: Placement | None,
    layers: Sequence[int],
) -> Compression:
    """A policy applied to prompts of these lengths.

    Args:
        new_tokens: number of new tokens that the caches must have room for.
        layers: layers whose heads keep different tokens.
    """
    lengths = np.asarray(lengths, np.int32)
    groups = layer_groups(config, layers)
    rows: tuple[PoolRows, ...] = ()
    if groups:
        align = alignment(budgets.dtype or dtype, placement)
        ways = 1 if placement is None else placement.ways
        copies = 1 if placement is None else head_copies(budgets.caps.shape[2], ways)
        rows = tuple(group_rows(config, budgets, lengths, g, align, ways, copies) for g in groups)
    # Without a scorer a layer keeps the whole prompt, and needs no number of slots.
    alike = [] if budgets.scorer is None else sorted({*range(config.num_layers)} - {*layers})
    slots = layer_slots(config, budgets, lengths, new_tokens, alike) if alike else {}
    return Compression(config, budgets, lengths, new_tokens, dtype, placement, groups, rows, slots)


def layer_slots(
    config: ModelConfig,
    budgets: Budgets,
    lengths: Int[np.ndarray, " B"],
    new_tokens: int,
    layers: Sequence[int],
) -> dict[int, int]:
    """Slots of each layer whose heads all keep the same tokens, new tokens included.

    Two programs are compiled for each number of slots. So layers share a number, as long as all
    layers together have at most the slots that `bucket_rows` may add to each of them.
    """
    room, kept = room_bucket(new_tokens), {}
    for layer in layers:
        recent = recent_tokens(config, budgets, layer)
        caps = np.minimum(common_caps(budgets, layer), np.maximum(lengths - recent, 0))
        kept[layer] = int((caps + recent).max())
    counts = [kept[layer] + room for layer in layers]
    most = sum(count + count // least_steps(count) for count in counts)
    slots = np.asarray([bucket_rows(kept[layer]) + room for layer in layers], np.int64)
    while True:
        sizes, members = np.unique(slots, return_counts=True)
        # Layers of one size take the next larger size, where that adds the fewest slots.
        added = members[:-1] * np.diff(sizes)
        if not added.size or slots.sum() + added.min() > most:
            return dict(zip(layers, slots.tolist(), strict=True))
        at = int(added.argmin())
        slots[slots == sizes[at]] = sizes[at + 1]


def common_caps(budgets: Budgets, layer: int) -> Int[np.ndarray, " B"]:
    """The mean of the caps of a layer whose heads keep the same tokens."""
    return np.rint(budgets.caps[:, layer].mean(axis=1)).astype(np.int32)


def recent_tokens(config: ModelConfig, budgets: Budgets, layer: int) -> Int[np.ndarray, " B"]:
    """The last tokens that always stay in one layer: at most its sliding window."""
    sliding = config.layers[layer].attention.spec.window
    return budgets.recent if sliding is None else np.minimum(budgets.recent, np.int32(sliding))


def without_queries(prefilled: PrefillCache) -> PrefillCache:
    """The prompt with none of its last queries; their dtype stays."""
    batch, _, heads, width = prefilled.queries.shape
    return dataclasses.replace(
        prefilled, queries=np.zeros((batch, 0, heads, width), prefilled.queries.dtype)
    )


def layer_groups(config: ModelConfig, layers: Sequence[int]) -> tuple[LayerGroup, ...]:
    """Groups the layers by the widths of their entries."""
    found: dict[tuple[int, int], list[int]] = {}
    for layer in layers:
        found.setdefault(config.layers[layer].attention.cached_widths, []).append(layer)
    windows = [layer.attention.spec.window for layer in config.layers]
    return tuple(
        LayerGroup(tuple(own), widths, tuple(windows[layer] for layer in own))
        for widths, own in found.items()
    )


def group_rows(
    config: ModelConfig,
    budgets: Budgets,
    lengths: Int[np.ndarray, " B"],
    group: LayerGroup,
    align: int,
    ways: int,
    copies: int,
) -> PoolRows:
    """The rows of one group's pool."""
    own = list(group.layers)
    kept, rooms = kept_tokens(config, budgets, lengths)[:, own], budgets.rooms[:, own]
    if budgets.again:  # later tokens fill budgets that the prompt does not fill
        kept = np.maximum(kept, budgets.caps[:, own] + budgets.recent[:, None, None])
    # A sliding window bounds a layer's segments; other layers have no limit.
    unlimited = np.iinfo(np.int32).max
    limits = np.asarray([window or unlimited for window in group.windows], np.int64)
    heads, spare = kept.shape[2] * copies, 0
    if budgets.sharing is not None:
        # No segment is longer than a sliding window, so even shares of a budget need the most rows.
        whole = budgets.caps[:, own] + budgets.recent[:, None, None]
        sliding = (limits < unlimited)[:, None]
        kept, rooms = (
            np.where(sliding, evenly(whole), kept),
            np.where(sliding, evenly(rooms), rooms),
        )
        spare = heads * (align - 1)  # each head's segment is rounded up, on whichever device it is
    repeated = np.repeat(kept, copies, axis=2).astype(np.int64)
    rooms = np.repeat(rooms, copies, axis=2).astype(np.int64)
    if budgets.sharing is not None and ways > 1:
        # The heads of one device may use a layer's whole budget.
        spare += int(repeated.sum(axis=2).max())
    return pool_rows(repeated, rooms, limits, spare, align, ways)


def evenly(rows: Int[np.ndarray, "*B K"]) -> Int[np.ndarray, "*B K"]:
    """The mean of the heads, rounded up, for each head."""
    mean = -(-rows.sum(axis=-1, keepdims=True) // rows.shape[-1])
    return np.broadcast_to(mean, rows.shape)


def kept_tokens(
    config: ModelConfig, budgets: Budgets, lengths: Int[np.ndarray, " B"]
) -> Int[np.ndarray, "B L K"]:
    """Tokens that each head keeps of a prompt, the recent ones included. For heads that share their
    budgets these are the numbers before sharing."""
    sliding = [layer.attention.spec.window for layer in config.layers]
    reach = np.asarray([window or np.iinfo(np.int32).max for window in sliding], np.int64)
    recent = np.minimum(budgets.recent[:, None], reach[None])
    lengths = np.asarray(lengths, np.int64)[:, None]
    # The next query sees `sliding` − 1 tokens before its own.
    available = np.maximum(np.minimum(lengths, reach[None] - 1) - recent, 0)
    kept = np.minimum(budgets.caps, available[..., None]) + np.minimum(lengths, recent)[..., None]
    return kept.astype(np.int32)


def longest_segment(budgets: Budgets) -> int:
    """Upper bound on a head's rows between two compressions, rounded up."""
    most = budgets.caps.sum(axis=2).max() if budgets.sharing else budgets.caps.max()
    return bucket_rows(int(most) + int(budgets.recent.max()) + int(budgets.rooms.max()))


def alignment(dtype: Any, placement: Placement | None) -> int:
    """`pool_alignment` on the platform of the placement."""
    return pool_alignment(dtype, None if placement is None else placement.platform)


def budgeted_layers(config: ModelConfig) -> list[int]:
    """Numbers of the layers whose heads can keep different tokens."""
    layers = enumerate(config.layers)
    return [index for index, layer in layers if layer.attention.no_head_budget is None]
