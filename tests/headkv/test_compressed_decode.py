"""Decoding from a compressed cache equals attention over all tokens, the evicted ones masked."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pools import at_work, attend, budgets, segments

from kvjax.cache import AttentionSpec, DenseCache, PrefillCache
from kvjax.policies.budgets import Adaptive

W, K, G, H, S, NEW = 8, 2, 2, 8, 48, 50
LENGTHS = np.asarray([48, 30, 8, 1], np.int32)
SPEC = AttentionSpec(0.4)
B = len(LENGTHS)


@functools.cache
def tokens():
    """Queries, keys and values of the prompts and of the new tokens: [B, S + NEW, ·, H]."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((B, S + NEW, K * G, H)).astype(np.float32)
    k, v = rng.standard_normal((2, B, S + NEW, K, H)).astype(np.float32)
    return q, k, v


def at(array, positions):
    """array[b, positions[b]]."""
    return np.take_along_axis(array, positions[:, :, None, None], axis=1)


read = jax.jit(PrefillCache.attend, static_argnames="spec")


def keep(caps=(5, 23), sharing=None, dtype=None, room=NEW, rings=(False, False), again=False):
    settings = {"sharing": sharing, "dtype": dtype, "again": again}
    return budgets(caps, B, W, room, rings, **settings)


def work_of(setting, spec=SPEC):
    return at_work(setting, LENGTHS, spec, (K * G, K, H))


def compressed(setting, spec=SPEC):
    """The cache of the prompts cut down."""
    q, k, v = (x[:, :S] for x in tokens())
    steps = np.arange(S, dtype=np.int32)[None]
    positions = jnp.asarray(np.where(steps < LENGTHS[:, None], steps, -1))
    dense = DenseCache.create(B, K, S, H, H, "float32")
    prompt = PrefillCache.create(dense, W, K * G, H, jnp.dtype("float32"))
    _, prompt = read(prompt, q, k, v, positions, spec)
    work = work_of(setting, spec)
    return work.compress(work.start(), 0, prompt.seen_by(None))


def held(cache, row, head):
    """Positions of a head's live entries, found by their keys."""
    starts, _, live = segments(cache[0])
    start, count = starts[row, head], live[row, head]
    pool = np.asarray(cache.pools[0].k)[row, start : start + count]
    same = (pool[:, None] == tokens()[1][row, :, head][None]).all(-1)
    assert (same.sum(1) == 1).all()
    return same.argmax(1)


def oracle(row, n, query, seen, spec):
    """One query head over the tokens at the positions `seen`."""
    q, k, v = (x[row].astype(np.float64) for x in tokens())
    seen = np.asarray([i for i in seen if spec.window is None or query - i < spec.window])
    weights = np.exp(k[seen, n // G] @ q[query, n] * spec.scale)
    return weights / weights.sum() @ v[seen, n // G]


CASES = {
    "budgets": (keep(), SPEC),
    "nothing_but_the_window": (keep((0, 0)), SPEC),
    "one_huge_head": (keep((0, 200)), SPEC),
    "split_by_scores": (keep((14, 14), Adaptive()), SPEC),
    "sliding": (keep((5, 9), rings=(True, True)), AttentionSpec(0.4, window=20)),
    "sliding_split": (keep((7, 7), Adaptive(), rings=(True, True)), AttentionSpec(0.4, window=20)),
}


@pytest.mark.parametrize("case", CASES)
def test_fifty_tokens(case):
    setting, spec = CASES[case]
    cache = compressed(setting, spec)
    kept = {(b, h): list(held(cache, b, h)) for b in range(B) for h in range(K)}
    caps = np.minimum(setting.caps[0, 0], S)
    if setting.sharing is None and spec.window is None:
        for (b, h), positions in kept.items():
            n = LENGTHS[b]
            assert len(positions) == min(caps[h], max(n - W, 0)) + min(n, W)
    q, k, v = tokens()
    for step in range(NEW):
        positions = (LENGTHS + step)[:, None]
        out, cache = attend(cache, *(at(x, positions) for x in (q, k, v)), positions, spec)
        if step % 7 and step < NEW - 1:
            continue
        for b in range(B):
            for n in range(K * G):
                query = int(positions[b, 0])
                seen = [*kept[b, n // G], *range(LENGTHS[b], query + 1)]
                want = oracle(b, n, query, seen, spec)
                np.testing.assert_allclose(out[b, 0, n], want, atol=1e-5)
    np.testing.assert_array_equal(cache.lengths, LENGTHS + NEW)


@pytest.mark.parametrize("case", CASES)
def test_a_chunk_equals_single_tokens(case):
    setting, spec = CASES[case]
    q, k, v = tokens()
    size = 40
    positions = (LENGTHS[:, None] + np.arange(size)).astype(np.int32)
    positions[1, 33:] = -1
    one, many = compressed(setting, spec), compressed(setting, spec)
    chunk, many = attend(many, *(at(x, positions) for x in (q, k, v)), positions, spec)
    for t in range(size):
        now = positions[:, t : t + 1]
        out, one = attend(one, *(at(x, now) for x in (q, k, v)), now, spec)
        real = now[:, 0] >= 0
        np.testing.assert_allclose(np.asarray(out)[real, 0], np.asarray(chunk)[real, t], atol=1e-5)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_ring_keeps_the_prompt_and_the_newest_tokens():
    cache = compressed(keep((5, 23), room=6, rings=(True, False)))
    first = {b: list(held(cache, b, 0)) for b in range(B)}
    capacities = segments(cache[0])[1]
    assert [capacities[b, 0] - len(first[b]) for b in range(B)] == [6] * B
    q, k, v = tokens()
    for step in range(30):
        positions = (LENGTHS + step)[:, None]
        out, cache = attend(cache, *(at(x, positions) for x in (q, k, v)), positions, SPEC)
        for b in range(B):
            query = int(positions[b, 0])
            recent = range(max(LENGTHS[b], query + 1 - 6), query + 1)
            for n in range(G):  # the other head has no ring; it is full after six tokens
                want = oracle(b, n, query, [*first[b], *recent], SPEC)
                np.testing.assert_allclose(out[b, 0, n], want, atol=1e-5)


def test_a_chunk_longer_than_a_ring_leaves_its_newest_tokens():
    cache = compressed(keep((5, 5), room=6, rings=(True, True)))
    before = [set(held(cache, b, 0)) for b in range(B)]
    q, k, v = tokens()
    positions = (LENGTHS[:, None] + np.arange(20)).astype(np.int32)
    _, cache = attend(cache, *(at(x, positions) for x in (q, k, v)), positions, SPEC)
    for b in range(B):
        newest = set(range(LENGTHS[b] + 20 - 6, LENGTHS[b] + 20))
        assert set(held(cache, b, 0)) == before[b] | newest
    assert (np.asarray(cache.capacity) > 10**6).all()


@pytest.mark.parametrize("sharing", [None, Adaptive()])
def test_compressing_again_keeps_the_budget_and_the_newest_tokens(sharing):
    setting = keep((5, 11), sharing, room=10, again=True)
    cache, work = compressed(setting), work_of(setting)
    q, k, v = tokens()
    shapes = [leaf.shape for leaf in jax.tree.leaves(cache)]
    most = int(setting.caps[0].sum())
    for start in (0, 10, 20):
        for step in range(start, start + 10):
            positions = (LENGTHS + step)[:, None]
            _, cache = attend(cache, *(at(x, positions) for x in (q, k, v)), positions, SPEC)
        before = {(b, h): set(held(cache, b, h)) for b in range(B) for h in range(K)}
        cache = work.again(cache)
        assert [leaf.shape for leaf in jax.tree.leaves(cache)] == shapes
        total = np.zeros(B, int)
        for (b, h), found in before.items():
            left = list(held(cache, b, h))
            n = LENGTHS[b] + start + 10
            assert left == sorted(left) and set(left) <= found
            assert set(range(max(n - W, 0), n)) <= set(left)
            total[b] += len(left)
        assert (total <= most + K * W).all()
        assert total[0] == most + K * W


@pytest.mark.parametrize(
    "dtype, tolerance", [("int8", 0.02), ("float8_e4m3fn", 0.12), ("int4", 0.4)]
)
def test_smaller_entries_are_near(dtype, tolerance):
    exact, coarse = compressed(keep()), compressed(keep(dtype=dtype))
    q, k, v = tokens()
    for step in range(20):
        positions = (LENGTHS + step)[:, None]
        new = [at(x, positions) for x in (q, k, v)]
        want, exact = attend(exact, *new, positions, SPEC)
        got, coarse = attend(coarse, *new, positions, SPEC)
        assert np.abs(np.asarray(got) - np.asarray(want)).max() < tolerance
    stored = coarse.pools[0].k
    assert stored.dtype == dtype and stored.shape == exact.pools[0].k.shape
