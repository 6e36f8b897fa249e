"""Every token scorer against a slow oracle in plain NumPy, on a ragged batch read in chunks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import AttentionSpec, DenseCache, PrefillCache
from kvjax.config import GQAConfig, RopeConfig, YarnScaling
from kvjax.nn.layers import rope
from kvjax.policies.observers import ColumnSums, ExpectedAttention, unrotate
from kvjax.policies.scorers import (
    KeyDifference,
    KeyNorm,
    LastQuery,
    LayerView,
    SpanWindow,
    max_pool,
    passed_on,
)

W, K, G, H, S = 4, 2, 2, 8, 40
LENGTHS = (1, 3, 21, 40)
PLAIN = RopeConfig(H)
ROPES = {
    "plain": PLAIN,
    "partial": RopeConfig(4),
    "interleaved": RopeConfig(H, interleaved=True),
    "yarn": RopeConfig(H, scaling=YarnScaling(4.0, 16, 1.3)),
    "none": None,
}


def attention(rope=PLAIN):
    return GQAConfig(K * G, K, H, 0.4, rope)


@functools.cache
def arrays():
    rng = np.random.default_rng(0)
    q = rng.standard_normal((len(LENGTHS), S, K * G, H)).astype(np.float32)
    k, v = rng.standard_normal((2, len(LENGTHS), S, K, H)).astype(np.float32)
    return q, k, v


@jax.jit
def step(cache, q, k, v, positions):
    return cache.attend(q, k, v, positions, AttentionSpec(0.4))[1]


def read(scorer, chunks=(16, 16, 8), config=None, q=None):
    """The prompt after it was read in chunks, padding (NaN) on the right."""
    q_all, k, v = arrays()
    q = q_all if q is None else q
    steps = np.arange(S, dtype=np.int32)[None]
    positions = np.where(steps < np.asarray(LENGTHS)[:, None], steps, -1).astype(np.int32)
    pad = (positions < 0)[:, :, None, None]
    q, k, v = (np.where(pad, np.float32(np.nan), x) for x in (q, k, v))
    watching = getattr(scorer, "observer", None)
    observers = (watching(config or attention()),) if watching else ()
    dense = DenseCache.create(len(LENGTHS), K, S, H, H, "float32")
    cache = PrefillCache.create(dense, W, K * G, H, jnp.dtype("float32"), observers=observers)
    start = 0
    for size in chunks:
        part = slice(start, start + size)
        cache = step(cache, q[:, part], k[:, part], v[:, part], positions[:, part])
        start += size
    return LayerView.create(cache.seen_by(0 if watching else None), AttentionSpec(0.4))


def weights(row, n, head, query):
    """Softmax weights of one query of one head over the keys up to it."""
    q, k, _ = arrays()
    logits = k[row, : query + 1, head // G].astype(np.float64) @ q[row, query, head] * 0.4
    found = np.exp(logits - logits.max())
    return np.pad(found / found.sum(), (0, n - query - 1))


def check(scorer, oracle, **settings):
    got = np.asarray(jax.jit(scorer)(read(scorer, **settings)))
    for row, n in enumerate(LENGTHS):
        for head in range(K):
            np.testing.assert_allclose(got[row, head, :n], oracle(row, n, head), atol=1e-5)


def test_column_sums():
    def oracle(row, n, head):
        heads = range(head * G, head * G + G)
        return sum(weights(row, n, h, i) for h in heads for i in range(n)) / G

    check(ColumnSums(), oracle)
    check(ColumnSums(), oracle, chunks=(40,))


def test_last_query():
    def oracle(row, n, head):
        return np.mean([weights(row, n, h, n - 1) for h in range(K * G)], axis=0)

    check(LastQuery(), oracle)


def test_key_norm():
    check(KeyNorm(), lambda row, n, head: -np.linalg.norm(arrays()[1][row, :n, head], axis=1))


def test_key_difference():
    def oracle(row, n, head):
        keys = arrays()[1][row, :n, head].astype(np.float64)
        unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
        anchor = unit.mean(0)
        return -unit @ anchor / np.linalg.norm(anchor)

    check(KeyDifference(), oracle)


@pytest.mark.parametrize("name", ROPES)
def test_expected_attention(name):
    """Queries are rotated here; the oracle knows them as they were before."""
    config, future = ROPES[name], 24
    raw, keys, values = arrays()
    lengths = jnp.asarray(LENGTHS, jnp.int32)

    def turn(x, positions):
        return np.asarray(rope(jnp.asarray(x), positions, lengths[:1], config), np.float64)

    steps = jnp.arange(S, dtype=jnp.int32)[None]
    rotated = np.concatenate([turn(raw[i : i + 1], steps) for i in range(len(LENGTHS))])

    def oracle(row, n, head):
        ahead = jnp.arange(n, n + future, dtype=jnp.int32)[None]
        units = np.broadcast_to(np.eye(H, dtype=np.float32)[None, None], (1, future, H, H))
        matrix = turn(units, ahead)[0].mean(0).T
        k = keys[row, :n, head].astype(np.float64)
        found = []
        for h in range(head * G, head * G + G):
            q = raw[row, :n, h].astype(np.float64)
            mean, covariance = matrix @ q.mean(0), matrix @ np.cov(q.T, bias=True) @ matrix.T
            logits = k @ mean * 0.4 + np.einsum("sx,xy,sy->s", k, covariance, k) * 0.4**2 / 2
            weight = np.exp(logits - logits.max())
            found.append(weight / weight.sum())
        return np.mean(found, axis=0) * np.linalg.norm(values[row, :n, head], axis=1)

    scorer = ExpectedAttention(future)
    check(scorer, oracle, config=attention(config), q=rotated.astype(np.float32))


@pytest.mark.parametrize("name", ["plain", "partial", "interleaved"])
def test_unrotate_is_the_inverse_of_rope(name):
    q = jnp.asarray(arrays()[0])
    positions = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32)[None], q.shape[:2])
    lengths = jnp.full((q.shape[0],), S, jnp.int32)
    turned = rope(q, positions, lengths, ROPES[name])
    back = unrotate(turned, positions, lengths, ROPES[name])
    np.testing.assert_allclose(back, q, atol=1e-5)


def test_pooling_sees_no_padding_and_no_window():
    scores = jnp.asarray([[[1.0, 0.0, 0.0, 0.0, 9.0]]])
    candidates = jnp.asarray([[[True, True, True, True, False]]])
    np.testing.assert_array_equal(max_pool(scores, candidates, 3)[0, 0, :4], [1.0, 1.0, 0.0, 0.0])


def test_a_token_gets_the_strongest_part_of_the_attention_near_it():
    ahead, behind, fade = 5, 2, 0.5

    def oracle(row, n, head):
        first = max(n - W, 0)
        heads = range(head * G, head * G + G)
        of_query = [
            np.mean([weights(row, n, h, i) for h in heads], axis=0) * fade ** (n - 1 - i)
            for i in range(first, n)
        ]
        best = np.max(of_query, axis=0)
        best[first:] = 0
        logs = np.log(np.maximum(best, np.finfo(np.float32).tiny))
        by = np.arange(n)[:, None] - np.arange(n)[None]
        share = np.where(by > 0, by / ahead, -by / behind)
        return np.max(logs[None] - np.where(share < 1, share**2, 2 * share - 1), axis=1)

    check(SpanWindow(ahead, behind, W, fade), oracle)


@pytest.mark.parametrize("by", [0, 3, -3])
def test_attention_that_is_passed_on_nowhere_or_to_one_side(by):
    logs = jnp.full((1, 1, 9), -80.0).at[0, 0, 4].set(0.0)
    found = np.asarray(passed_on(logs, by))[0, 0]
    side = found[5:] if by >= 0 else found[3::-1]
    expected = [-1 / 9, -4 / 9, -1, -5 / 3] if by else [-80.0] * 4
    np.testing.assert_allclose(side, expected, atol=1e-5)
    other = found[:4] if by >= 0 else found[5:]
    np.testing.assert_allclose(other, -80.0, atol=1e-5)


def test_the_sharper_the_attention_the_longer_the_span():
    def kept(other):
        """Of the ten best tokens, those from the first attended place on."""
        attention = np.full((1, 1, S, 1), 1e-6, np.float32)
        attention[0, 0, [8, 32], 0] = 1.0, other
        one = jnp.ones((1, 1, 1, 1))
        lengths, positions = jnp.asarray([S]), jnp.arange(S)[None, None]
        keys = jnp.log(attention)  # the softmax of one query gives the attention back
        entries = keys, keys, one, lengths, lengths[:, None], positions
        view = LayerView(*entries, None, jnp.asarray([1]), AttentionSpec(1.0))
        best = np.argsort(-np.asarray(SpanWindow(4, 1)(view))[0, 0])[:10]
        return np.sum((best >= 8) & (best < 18))

    assert [kept(0.9), kept(0.2), kept(0.03)] == [5, 6, 8]
