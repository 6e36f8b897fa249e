"""The rows of a pool: few sizes, little rounding, every segment inside and by itself."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import Pool
from kvjax.cache.pool import LARGE, bucket_rows, lay_segments, pool_rows
from kvjax.cache.storage import room_bucket
from kvjax.config import GQAConfig, LayerConfig, MLPConfig, ModelConfig, RopeConfig
from kvjax.policies.budgets import Adaptive
from kvjax.policies.compression import Budgets, group_rows, kept_tokens, layer_groups
from kvjax.policies.scorers import SinksAndRecent

B, L, K = 3, 3, 8
SLIDING = (None, 40, 150)
ATTENTION = [GQAConfig(K, K, 4, 0.5, RopeConfig(4), window=window) for window in SLIDING]
CONFIG = ModelConfig("llama", 8, 8, tuple(LayerConfig(a, MLPConfig(8)) for a in ATTENTION))
(GROUP,) = layer_groups(CONFIG, range(L))
LIMITS = np.asarray([window or 10**9 for window in SLIDING])


def test_buckets_are_few_and_near():
    counts = np.arange(1, 70_000)
    buckets = np.asarray([bucket_rows(int(count)) for count in counts])
    share = buckets / counts - 1
    assert share.min() == 0 and share.max() <= 0.12
    assert share[counts >= LARGE].max() <= 0.03
    assert (np.diff(buckets) >= 0).all()
    assert len(set(buckets[:LARGE])) < 110 and len(set(buckets[LARGE - 1 : 2 * LARGE])) < 40
    assert all(bucket_rows(int(bucket)) == bucket for bucket in set(buckets))


def test_rooms_are_few():
    wanted = {0: 0, 1: 64, 64: 64, 65: 128, 128: 128, 129: 256, 1000: 1024, 1025: 2048}
    assert {new: room_bucket(new) for new in wanted} == wanted


def budgets_of(rng, kind):
    """Budgets of a batch of ragged prompts."""
    lengths = rng.integers(1, 3000, B).astype(np.int32)
    recent = rng.integers(1, 33, B).astype(np.int32)
    spread = rng.choice([0, 1, 4])  # all heads alike, or some with much more than others
    caps = rng.random((B, L, K)) ** spread * rng.choice([5, 60, 900])
    reach = np.minimum(lengths[:, None], np.minimum(LIMITS, 3000)) - recent[:, None]
    caps = np.minimum(caps.astype(np.int32), np.maximum(reach, 0)[..., None]).astype(np.int32)
    rooms = np.full((B, L, K), room_bucket(int(rng.integers(1, 300))), np.int32)
    rings = rng.random((B, L, K)) < (0.5 if "rings" in kind else 0)
    rooms = np.where(rings, 8, rooms).astype(np.int32)
    sharing = Adaptive() if "sharing" in kind else None
    again = "every" in kind
    return lengths, Budgets(caps, recent, rooms, rings, SinksAndRecent(), sharing, 0, again)


def held_rows(rng, lengths, budgets):
    """Rows that heads may come to keep: their own, or a share of their layer's in any way."""
    kept = kept_tokens(CONFIG, budgets, lengths)
    if budgets.again:  # later, when the text has grown
        kept = np.maximum(kept, kept_tokens(CONFIG, budgets, lengths + 10_000))
    if budgets.sharing is None:
        return kept
    grown = lengths + 10_000 * budgets.again
    reach = np.minimum(grown[:, None], LIMITS - 1)
    recent = np.minimum(budgets.recent[:, None], LIMITS)
    available = np.maximum(reach - recent, 0)
    held = np.empty((B, L, K), np.int64)
    for b, layer in np.ndindex(B, L):
        most = int(available[b, layer])
        left = min(int(budgets.caps[b, layer].sum()), K * most)
        order, counts = rng.permutation(K), np.zeros(K, np.int64)
        even = rng.random() < 0.5
        for turn, head in enumerate(order):
            counts[head] = min(most, -(-left // (K - turn)) if even else left)
            left -= counts[head]
        held[b, layer] = counts + min(int(grown[b]), int(recent[b, layer]))
    return held


def segments(held, budgets, size, align, devices):
    """Starts and whole capacities [B, L, K], as every device lays its heads."""
    nothing = jnp.zeros((B, L, K // devices), jnp.int32)
    found = []
    for device in range(devices):
        own = slice(device * K // devices, (device + 1) * K // devices)
        pool = Pool(None, None, nothing, nothing, nothing, nothing, None, None, align=align)
        for layer, window in enumerate(SLIDING):
            rows = jnp.asarray(held[:, layer, own], jnp.int32)
            first = jnp.asarray(size.first[:, layer, device])
            rooms = jnp.asarray(budgets.rooms[:, layer, own])
            rings = jnp.asarray(budgets.rings[:, layer, own] | (window is not None))
            pool = lay_segments(pool, layer, rows, first, rooms, rings, window)
        found.append((np.asarray(pool.starts), np.asarray(pool.capacities)))
    return found


@pytest.mark.parametrize(
    "kind", ["own", "sharing", "rings", "every", "sharing,rings", "sharing,every"]
)
@pytest.mark.parametrize(("align", "devices"), [(1, 1), (8, 1), (16, 2), (32, 8), (1, 4)])
def test_segments_are_inside_and_apart(kind, align, devices):
    for seed in range(12):
        rng = np.random.default_rng([seed, align, devices, len(kind)])
        lengths, budgets = budgets_of(rng, kind)
        size = group_rows(CONFIG, budgets, lengths, GROUP, align, devices, 1)
        assert size.rows % align == 0
        held = held_rows(rng, lengths, budgets)
        for starts, capacities in segments(held, budgets, size, align, devices):
            assert (starts % align == 0).all() and (starts >= 0).all()
            ends = starts + -(-capacities // align) * align
            assert ends.max() <= size.rows
            assert (ends.max(axis=2) - starts.min(axis=2)).max() <= size.span
            for b in range(B):
                order = np.argsort(starts[b], axis=None)
                assert (ends[b].flat[order][:-1] <= starts[b].flat[order][1:]).all()


@pytest.mark.parametrize("mean", [3, 40, 700, 6000])
@pytest.mark.parametrize("new", [0, 1, 200])
def test_kept_rows_are_rounded_by_little(mean, new):
    room, limits = room_bucket(new), np.full(L, 10**9)
    rooms = np.full((B, L, K), room, np.int64)
    for seed in range(10):
        kept = np.random.default_rng([seed, mean]).integers(1, 2 * mean, (B, L, K))
        most = int(kept.sum(axis=(1, 2)).max())
        size = pool_rows(kept, rooms, limits, 0, 1, 1)
        rounded = size.rows - room * L * K  # room for new tokens is a bucket of its own
        assert most <= rounded <= most * (1.03 if most >= LARGE else 1.12)
        np.testing.assert_array_equal(size.first[:, 0], 0)


def test_copies_of_a_head_have_rows_of_their_own():
    rng = np.random.default_rng(3)
    lengths, budgets = budgets_of(rng, "own")
    once = group_rows(CONFIG, budgets, lengths, GROUP, 1, 1, 1)
    twice = group_rows(CONFIG, budgets, lengths, GROUP, 1, 16, 2)
    assert twice.first.shape == (B, L, 16)
    assert twice.rows >= once.rows / (K * 1.12)
