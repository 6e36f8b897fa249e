"""Policies: parsing, budgets, and what generation gets from them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import random_params

from kvjax import policies
from kvjax.cache import PoolLayer, cache_bytes
from kvjax.cache.pool import bucket_rows
from kvjax.cache.storage import room_bucket
from kvjax.config import (
    EqualCacheConfig,
    GQAConfig,
    LayerConfig,
    MLPConfig,
    ModelConfig,
    RopeConfig,
)
from kvjax.headkv import HeadScores
from kvjax.nn import Transformer
from kvjax.policies import Budgets, Policy
from kvjax.policies.budgets import Adaptive, HeadImportance, Pyramid, Request, Uniform
from kvjax.policies.named import measurements_digest, parse_policy, resolve
from kvjax.policies.need import MeasuredNeed, NeedCurves
from kvjax.policies.policy import Compress, Full
from kvjax.policies.scorers import KeyNorm, ObservationWindow, SinksAndRecent, SpanWindow
from kvjax.prefilling import prefill

GQA = GQAConfig(4, 2, 8, 8**-0.5, RopeConfig(8), qkv_bias=True, qk_norm="head")
SLIDING = GQAConfig(4, 2, 8, 8**-0.5, RopeConfig(4), window=11, softcap=20.0)
PLAIN = GQAConfig(4, 2, 8, 8**-0.5, RopeConfig(8))
LATENT = EqualCacheConfig(PLAIN, 2, 8, 8, "before_up")
BUCKET, LENGTHS, ROOM = 32, (32, 30, 19, 5), 4


def config(*attention):
    return ModelConfig("llama", 53, 32, tuple(LayerConfig(a, MLPConfig(32)) for a in attention))


SHAPE = config(GQA, SLIDING, LATENT)
SCORES = HeadScores(np.random.default_rng(0).random((3, 4, 5)) ** 4)


@pytest.fixture(scope="module")
def model():
    return Transformer(SHAPE)


@pytest.fixture(scope="module")
def params(model):
    return random_params(model)


@pytest.fixture(scope="module")
def run(model, params):
    """Prefill under a policy, then decode steps of 1, 1 and 2 tokens: caches and all logits."""
    tokens = np.random.default_rng(0).integers(0, 53, (4, BUCKET + ROOM)).astype(np.int32)
    lengths = np.asarray(LENGTHS, np.int32)

    @functools.cache
    def run(policy):
        resolved = resolve(policy, model.config, SCORES)
        logits, cache = prefill(model, params, tokens[:, :BUCKET], lengths, resolved, ROOM)
        first, outs, start = cache, [np.asarray(logits)[:, None]], BUCKET
        for size in (1, 1, 2):
            out, cache = model.apply(
                {"params": params}, tokens[:, start : start + size], cache=cache
            )
            outs.append(out)
            start += size
        return first, np.concatenate(outs, axis=1)

    return run


@pytest.mark.parametrize("policy", ["snapkv:kv_size=32", "headkv:kv_size=40"])
def test_a_budget_of_everything_is_the_dense_cache(run, policy):
    _, dense = run("full")
    caches, logits = run(policy)
    assert all(isinstance(cache, PoolLayer) for cache in caches)
    np.testing.assert_allclose(logits, dense, atol=1e-5)


def test_smaller_budgets_hold_fewer_bytes_and_change_the_logits(run):
    full, dense = run("full")
    caches, logits = run("headkv:kv_size=12")
    np.testing.assert_allclose(logits[:, 0], dense[:, 0], atol=1e-5)  # prefill is exact
    assert np.abs(logits[0, 1:] - dense[0, 1:]).max() > 1e-3
    np.testing.assert_allclose(logits[3], dense[3], atol=1e-5)  # 5 tokens fit any budget
    (pool,) = caches.pools
    kept = resolve("headkv:kv_size=12", SHAPE, SCORES).kept(SHAPE, BUCKET)
    assert kept.sum() <= 12 * 3 * 2
    # The segments of the layer with a sliding window are the window, room included.
    room, fixed = room_bucket(ROOM) * 2 * 2, int(kept[[0, 2]].sum()) + 2 * 11
    assert pool.k.shape[1] == room + bucket_rows(fixed)
    assert bucket_rows(fixed) < 0.6 * 3 * 2 * BUCKET
    pools = pool.k.nbytes + pool.v.nbytes
    assert pools == pool.k.shape[1] * 16 * 4 * len(LENGTHS)
    tables = 4 * pool.starts.nbytes + 3 * 4 * len(LENGTHS)
    assert cache_bytes(caches) == pools + pool.positions.nbytes + tables < cache_bytes(full)


def test_lengths_and_room(run):
    caches, _ = run("headkv:kv_size=12")
    policy = resolve("headkv:kv_size=12", SHAPE, SCORES)
    for row, n in enumerate(LENGTHS):
        caps, recent = policy.caps(SHAPE, n, "float32")
        assert caps.sum() == min(12 - 8, max(n - 8, 0)) * 3 * 2
        for index in (0, 2):
            layer = caches[index]
            expected = np.minimum(caps[index], max(n - recent, 0)) + min(n, recent)
            np.testing.assert_array_equal(layer.live(layer.given())[row], expected)
            np.testing.assert_array_equal(policy.kept(SHAPE, n)[index], expected)
            np.testing.assert_array_equal(layer.lengths, LENGTHS)
            assert (np.asarray(layer.capacity) >= np.asarray(LENGTHS) + ROOM).all()


def test_too_many_tokens_are_refused(run, model, params):
    caches, _ = run("headkv:kv_size=12")
    with pytest.raises(ValueError, match="room for 96 tokens per sequence, got 97"):
        model.apply({"params": params}, jnp.zeros((4, 65), jnp.int32), cache=caches)


def test_parse():
    assert parse_policy("full") == Full()
    assert parse_policy("streaming:n_sink=2") == Compress(Uniform(), SinksAndRecent(2))
    assert parse_policy("snapkv:kv_size=64,observed=16") == Compress(
        Uniform(), ObservationWindow(7), 64, 16
    )
    assert parse_policy("pyramidkv") == Compress(Pyramid(20.0), ObservationWindow(7))
    assert parse_policy("headkv_paper:beta=1.05") == Compress(
        HeadImportance(1.05), ObservationWindow(7)
    )
    assert parse_policy("headkv:beta=1.2") == Compress(HeadImportance(1.2), SpanWindow())
    assert parse_policy("headkv") == Compress(HeadImportance(None), SpanWindow())
    assert parse_policy("adasnapkv:kv_size=128,alpha=0.3") == Compress(
        Uniform(), ObservationWindow(7), sharing=Adaptive(0.3)
    )
    assert parse_policy("full:entries=int8") == Full("int8")
    assert parse_policy("knorm:bytes=4096,compression_interval=16") == Compress(
        Uniform(), KeyNorm(), 0, nbytes=4096, compression_interval=16
    )


@pytest.mark.parametrize(
    "old, new",
    [
        ("snapkv:window=16,pool=5", "snapkv:observed=16,kernel_size=5"),
        ("streaming:sinks=2,every=9", "streaming:n_sink=2,compression_interval=9"),
        ("h2o:recent=0.25", "h2o:recent_share=0.25"),
    ],
)
def test_parse_accepts_earlier_names(old, new):
    assert parse_policy(old) == parse_policy(new)
    with pytest.raises(ValueError, match="observed is given twice"):
        parse_policy("snapkv:window=16,observed=16")


def test_parse_reads_scores(tmp_path):
    path = tmp_path / "heads.json"
    SCORES.save(path)
    policy = parse_policy(f"headkv:scores={path}")
    np.testing.assert_array_equal(policy.allocator.scores.samples, SCORES.samples)
    other = HeadScores(SCORES.samples * 2)
    assert resolve(policy, config(*[GQA] * 3), other).allocator.scores is policy.allocator.scores


def test_makers_take_measurements(tmp_path):
    rises = np.array([[[9.0, 0.5, 0.0], [0.1, 0.0, 0.0]]])
    curves = NeedCurves(np.array([0, 16, 512]), rises, 0 * rises)
    SCORES.save(tmp_path / "heads.json")
    curves.save(tmp_path / "heads.need.json")
    for maker in (policies.headkv, policies.headkv_paper, policies.headkv_adaptive):
        given = maker(scores=SCORES).allocator
        assert isinstance(given, HeadImportance) and given.scores is SCORES
        named = maker(scores=str(tmp_path / "heads.json"))
        assert measurements_digest(named) == measurements_digest(maker(scores=SCORES)) != ""
    both = policies.headkv(scores=SCORES, need=curves)
    assert isinstance(both.allocator, MeasuredNeed) and both.allocator.curves is curves
    scores, need = (str(tmp_path / name) for name in ("heads.json", "heads.need.json"))
    named = policies.headkv(scores=scores, need=need)
    assert measurements_digest(named) == measurements_digest(both)


@pytest.mark.parametrize(
    "text, message",
    [
        ("h3o", "policy 'h3o' is not one of full, streaming, snapkv, spankv, pyramidkv"),
        ("full:kv_size=3", "expected entries=…"),
        ("snapkv:beta=2", "'beta=2' is not understood, expected kv_size=…, ratio=…"),
        ("snapkv:entries=int2", "entries is 'int2', expected one of int8, fp8, int4"),
        (
            "snapkv:kv_size=64,ratio=0.1",
            "kv_size is 64, ratio is 0.1 and bytes is None, expected one of",
        ),
        ("snapkv:ratio=1.5", "ratio is 1.5"),
        ("snapkv:ratio=0", r"ratio is 0\.0, expected a finite number above 0"),
        ("snapkv:ratio=-0.5", r"ratio is -0\.5, expected a finite number above 0"),
        ("snapkv:ratio=nan", "ratio is nan, expected a finite number above 0"),
        ("headkv_adaptive:bytes=0", "nbytes is 0, expected a whole number of at least 1"),
        ("snapkv:kv_size=0", "kv_size is 0, ratio is None and bytes is None, expected one of"),
        (
            "snapkv:kv_size=64,ring=8",
            "ring is 8, which bounds heads with a budget below the mean",
        ),
        ("adasnapkv:kv_size=64,ring=8", "ring is 8, which bounds heads with a budget below"),
        (
            "snapkv:ring=8,compression_interval=8",
            "ring and compression_interval both bound the growth",
        ),
        ("snapkv:kv_size", "'kv_size' is not understood"),
        ("snapkv:kv_size=1.5", "kv_size is '1.5', expected a whole number"),
        ("headkv:beta=big", "beta is 'big', expected a number"),
        ("snapkv:kv_size=8", "kv_size is 8 and observed is 8"),
        ("snapkv:observed=0", "observed is 0"),
        ("headkv:scores=nowhere.json", "no head score file at nowhere.json"),
    ],
)
def test_parse_errors(text, message):
    with pytest.raises(ValueError, match=message):
        parse_policy(text)


def test_resolve_errors():
    with pytest.raises(ValueError, match="kvjax score"):
        resolve("headkv", config(GQA), None)
    with pytest.raises(ValueError, match="3 layers x 4 heads, expected 1 layers x 4 heads"):
        resolve("headkv", config(GQA), SCORES)
    assert resolve("snapkv", config(GQA), None) == parse_policy("snapkv")


def test_the_floor_grows_with_the_budget():
    scores = HeadScores(np.asarray([[[1.0]] * 2, [[0.0]] * 2]))
    for kv_size, floor in ((18, 3), (58, 10), (208, 100), (808, 640)):
        caps = HeadImportance(scores=scores)(Request(2, 2, kv_size, 8, 10**6))
        assert caps.sum() == (kv_size - 8) * 4
        assert abs(int(caps[1, 0]) - floor) <= 1  # `growing_beta`; b // β is whole


@pytest.mark.parametrize("prompt_len", [4, 8, 20, 1000])
def test_allocators(prompt_len):
    request = Request(4, 2, 28, 8, prompt_len)
    limit = max(prompt_len - 8, 0)
    for allocator in (Uniform(), Pyramid(), HeadImportance(1.2, HeadScores(np.ones((4, 4, 1))))):
        caps = allocator(request)
        assert caps.shape == (4, 2) and caps.max() <= limit
        assert caps.sum() == min(20, limit) * 8
    caps = Pyramid()(Request(4, 2, 28, 8, 1000))
    np.testing.assert_array_equal(caps[:, 0], [39, 26, 14, 1])


def test_a_pyramid_of_one_layer_is_its_mean():
    np.testing.assert_array_equal(Pyramid()(Request(1, 2, 28, 8, 1000)), [[20, 20]])


def test_bad_allocators_are_named():
    for caps, message in (
        (np.ones((2, 2)), "expected whole numbers"),
        (np.ones((3, 2), int), r"expected whole numbers \(2, 2\)"),
        (np.full((2, 2), 99), "budgets of 99 to 99, expected 0 to 12"),
    ):
        policy = Compress(lambda request, caps=caps: caps, ObservationWindow(), 16)
        with pytest.raises(ValueError, match=message):
            policy.compression(config(GQA, GQA), [20], 0)


class LastTokens(Policy):
    """Keeps the last twelve tokens of a prompt."""

    def budgets(self, config, lengths, new_tokens, dtype):
        shape = len(lengths), config.num_layers, config.budget_heads
        kept = Budgets(
            caps=np.zeros(shape, np.int32),
            recent=np.full(len(lengths), 12, np.int32),
            rooms=np.full(shape, room_bucket(new_tokens), np.int32),
            rings=np.zeros(shape, bool),
            scorer=SinksAndRecent(),
        )
        return kept, list(range(config.num_layers))


def test_a_policy_is_its_budgets():
    own = LastTokens()
    same = Compress(lambda request: np.zeros((3, 2), int), SinksAndRecent(), 13, 12)
    for policy in (own, same):
        np.testing.assert_array_equal(policy.kept(SHAPE, 9), np.full((3, 2), 9))
        np.testing.assert_array_equal(policy.kept(SHAPE, 30), [[12, 12], [11, 11], [12, 12]])
    own, same = (policy.compression(SHAPE, LENGTHS, ROOM) for policy in (own, same))
    assert own.groups == same.groups
    jax.tree.map(np.testing.assert_array_equal, own.rows, same.rows)
