"""Selection against a slow oracle, one prompt and one head at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pools import at_work, budgets, segments

from kvjax.cache import AttentionSpec, DenseCache, PrefillCache
from kvjax.policies.scorers import ObservationWindow, SinksAndRecent
from kvjax.policies.selection import Ranking

W, CAPS, K, G, H, S = 8, (5, 17), 2, 2, 4, 40
LENGTHS = (3, 8, 9, 13, 14, 25, 26, 40)  # around w, cap + w and the end of the bucket
SPECS = {
    "plain": AttentionSpec(0.7),
    "capped": AttentionSpec(0.7, softcap=2.0),
    "sliding": AttentionSpec(0.7, window=12),
}


@functools.cache
def prompts():
    rng = np.random.default_rng(0)
    B = len(LENGTHS)
    q = rng.standard_normal((B, S, K * G, H)).astype(np.float32)
    k, v = (rng.standard_normal((B, S, K, H)).astype(np.float32) for _ in range(2))
    return q, k, v


def fill(q, k, v, chunks=(S,), padding=0.0):
    """A prompt cache that has read the prompts in chunks, with `padding` beyond their ends."""
    steps = np.arange(S, dtype=np.int32)[None]
    positions = np.where(steps < np.asarray(LENGTHS)[:, None], steps, -1).astype(np.int32)
    pad = (positions < 0)[:, :, None, None]
    q, k, v = (np.where(pad, np.float32(padding), x) for x in (q, k, v))
    dense = DenseCache.create(len(LENGTHS), K, S, H, H, "float32")
    cache, start = PrefillCache.create(dense, W, K * G, H, jnp.dtype("float32")), 0
    for size in chunks:
        part = slice(start, start + size)
        _, cache = attend(cache, q[:, part], k[:, part], v[:, part], positions[:, part])
        start += size
    return cache


@jax.jit
def attend(cache, q, k, v, positions):
    return cache.attend(q, k, v, positions, AttentionSpec(0.7))


def squeeze(prompt, spec, caps, scorer, room):
    """The cache of the prompts cut down."""
    found = budgets(caps, len(LENGTHS), W, room, spec.window is not None, scorer)
    work = at_work(found, LENGTHS, spec, (K * G, K, H))
    return work.compress(work.start(), 0, prompt.seen_by(None))


def oracle_scores(q, k, spec):
    """[K, n] pooled window scores of one prompt, −inf for what cannot be chosen."""
    n = len(q)
    first = max(n - W, 0)
    oldest = 0 if spec.window is None else max(n - spec.window + 1, 0)
    mean = np.zeros((K * G, n))
    for head in range(K * G):
        for i in range(first, n):
            logits = k[: i + 1, head // G].astype(np.float64) @ q[i, head] * spec.scale
            if spec.softcap is not None:
                logits = spec.softcap * np.tanh(logits / spec.softcap)
            if spec.window is not None:
                logits[: max(i - spec.window + 1, 0)] = -np.inf
            weights = np.exp(logits - logits.max())
            mean[head, : i + 1] += weights / weights.sum() / (n - first)
    grouped = mean.reshape(K, G, n).mean(1)
    grouped[:, first:] = -np.inf
    grouped[:, :oldest] = -np.inf
    pooled = np.full((K, n), -np.inf)
    for i in range(oldest, first):
        pooled[:, i] = grouped[:, max(i - 3, 0) : i + 4].max(1)
    return pooled, oldest, first


def oracle(q, k, cap, head, spec):
    """Positions that a head keeps, in the order of time."""
    pooled, oldest, first = oracle_scores(q, k, spec)
    order = sorted(range(oldest, first), key=lambda i: (pooled[head, i], i), reverse=True)
    return sorted(order[:cap]) + list(range(first, len(q)))


@pytest.mark.parametrize("name", SPECS)
def test_kept_tokens_equal_the_oracle(name):
    spec = SPECS[name]
    q, k, v = prompts()
    cache = squeeze(fill(q, k, v), spec, CAPS, ObservationWindow(), 3)
    np.testing.assert_array_equal(cache.lengths, LENGTHS)
    (pool,), (starts, capacities, live) = cache.pools, segments(cache[0])
    for row, n in enumerate(LENGTHS):
        for head, cap in enumerate(CAPS):
            kept = oracle(q[row, :n], k[row, :n], cap, head, spec)
            start = starts[row, head]
            assert live[row, head] == len(kept)
            assert capacities[row, head] == min(len(kept) + 3, spec.window or S)
            rows = slice(start, start + len(kept))
            np.testing.assert_array_equal(pool.k[row, rows], k[row, kept, head])
            np.testing.assert_array_equal(pool.v[row, rows], v[row, kept, head])
            dead = slice(start + len(kept), start + capacities[row, head])
            assert not np.any(pool.k[row, dead])
            if name == "sliding":
                np.testing.assert_array_equal(pool.positions[row, rows], kept)


def test_counts_are_what_headkv_says():
    cache = squeeze(fill(*prompts()), SPECS["plain"], CAPS, ObservationWindow(), 0)
    expected = [[min(cap, max(n - W, 0)) + min(n, W) for cap in CAPS] for n in LENGTHS]
    np.testing.assert_array_equal(segments(cache[0])[2], expected)


def test_nothing_leaks_through_padding():
    clean = squeeze(fill(*prompts()), SPECS["plain"], CAPS, ObservationWindow(), 0)
    nan = squeeze(fill(*prompts(), padding=np.nan), SPECS["plain"], CAPS, ObservationWindow(), 0)
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(nan), strict=True):
        np.testing.assert_array_equal(a, b)


def test_chunks_select_what_one_shot_selects():
    one = squeeze(fill(*prompts()), SPECS["plain"], CAPS, ObservationWindow(), 0)
    many = squeeze(fill(*prompts(), chunks=(10,) * 4), SPECS["plain"], CAPS, ObservationWindow(), 0)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_array_equal(a, b)


def test_ties_go_to_the_later_position():
    scores = jnp.asarray([[[1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 9.0]]])
    candidates = jnp.asarray([[[True] * 6 + [False]]])
    ranking = Ranking.of(scores, candidates)
    kept = ranking.select(candidates, jnp.asarray([[4]], jnp.int32))
    np.testing.assert_array_equal(kept[:, :, :4], [[[1, 3, 4, 5]]])


def test_equal_and_useless_scores_still_fill_the_budget():
    candidates = jnp.asarray([[[True] * 5 + [False] * 2]])
    for scores in (jnp.zeros((1, 1, 7)), jnp.full((1, 1, 7), -jnp.inf)):
        ranking = Ranking.of(scores, candidates)
        kept = ranking.select(candidates, jnp.asarray([[3]], jnp.int32))
        np.testing.assert_array_equal(kept[:, :, :3], [[[2, 3, 4]]])


def test_a_nan_score_displaces_nothing():
    def scorer(prompt):
        scores = ObservationWindow()(prompt)
        return scores.at[:, :, 3].set(jnp.nan)

    cache = squeeze(fill(*prompts()), SPECS["plain"], (6, 6), scorer, 0)
    _, k, _ = prompts()
    row = LENGTHS.index(40)
    starts, _, live = segments(cache[0])
    assert live[row].tolist() == [14, 14]
    kept = np.asarray(cache.pools[0].k[row])[starts[row, 0] :][:14]
    assert not (kept == k[row, 3, 0]).all(axis=1).any()


def test_sinks_and_recent_tokens():
    row = LENGTHS.index(40)
    cache = squeeze(fill(*prompts()), SPECS["plain"], (6, 6), SinksAndRecent(2), 0)
    _, k, _ = prompts()
    kept = [0, 1, *range(28, 40)]
    start = segments(cache[0])[0][row, 0]
    found = cache.pools[0].k[row, start : start + 14]
    np.testing.assert_array_equal(found, k[row, kept, 0])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.integers(0, 24), st.integers(0, 24), st.booleans())
def test_selection_keeps_the_best_in_the_order_of_time(seed, candidates, cap, few_values):
    """Against a sort, with many ties or none; what is no candidate never matters."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 3 if few_values else 10**6, (2, 24)).astype(np.float32)
    mask = np.arange(24) < candidates
    count = min(cap, candidates)
    known = jnp.asarray(mask)[None, None]
    ranking = Ranking.of(jnp.asarray(np.where(mask, scores, np.nan))[None], known)
    kept = ranking.select(known, jnp.full((1, 2), count, jnp.int32))
    for head in range(2):
        best = sorted(range(candidates), key=lambda i: (scores[head, i], i), reverse=True)
        found = np.asarray(kept)[0, head]
        np.testing.assert_array_equal(found[:count], sorted(best[:count]))
        assert (found[count:] == 24).all()
