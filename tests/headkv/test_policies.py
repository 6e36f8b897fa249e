"""Every policy by name, on every kind of attention, through generation."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import random_params

from kvjax import transmla
from kvjax.cache import DenseCache, LatentCache, PoolLayer, cache_bytes
from kvjax.cache.pool import bucket_rows
from kvjax.cache.storage import room_bucket
from kvjax.config import GQAConfig, LayerConfig, MLAConfig, MLPConfig, ModelConfig, RopeConfig
from kvjax.generation import generate
from kvjax.headkv import HeadScores
from kvjax.nn import Transformer
from kvjax.policies.budgets import Uniform, token_bytes
from kvjax.policies.named import MAKERS, resolve
from kvjax.policies.policy import Compress
from kvjax.policies.scorers import by_kv_head, query_attention
from kvjax.prefilling import pad, prefill, read_layer

GQA = GQAConfig(4, 2, 8, 8**-0.5, RopeConfig(8))
SLIDING = GQAConfig(4, 2, 8, 8**-0.5, RopeConfig(8), window=13)
MLA = MLAConfig(4, 16, 8, 8, 12, None, 0.3, RopeConfig(8))
BUCKET = 32
LENGTHS = (32, 21, 9, 1)  # of one bucket, so that each policy is compiled once
SCORES = HeadScores(np.random.default_rng(0).random((2, 4, 5)) ** 4)


@functools.cache
def build(kind):
    """A random model of two layers and its parameters."""
    if kind in ("after_up", "before_up"):
        init = "svd_global" if kind == "after_up" else "identity"
        return transmla.convert(*build("gqa"), init=init, rope_site=kind)
    layers = {"gqa": (GQA, GQA), "sliding": (GQA, SLIDING), "mla": (MLA, MLA)}[kind]
    layers = tuple(LayerConfig(attention, MLPConfig(32)) for attention in layers)
    model = Transformer(ModelConfig("llama", 61, 32, layers, max_position_embeddings=256))
    return model, random_params(model)


def prompts():
    rng = np.random.default_rng(1)
    return [rng.integers(0, 61, n).tolist() for n in LENGTHS]


@functools.cache
def run(kind, policy, new=24):
    model, params = build(kind)
    policy = resolve(policy, model.config, SCORES)
    return generate(model, params, prompts(), new, policy=policy, eos_ids=())


def read(kind, policy, lengths=(64, 64, 64)):
    """The cache after three prompts, padded to 64 tokens."""
    model, params = build(kind)
    tokens = np.random.default_rng(2).integers(0, 61, (3, 64)).astype(np.int32)
    policy = resolve(policy, model.config, SCORES)
    return prefill(model, params, tokens, np.asarray(lengths, np.int32), policy, 4)


@functools.cache
def dense(kind):
    """Greedy continuations by the uncompressed cache."""
    model, params = build(kind)
    cache = model.init_cache(len(LENGTHS), BUCKET + 24, "float32")
    ids = np.zeros((len(LENGTHS), BUCKET), np.int32)
    for row, prompt in zip(ids, prompts(), strict=True):
        row[: len(prompt)] = prompt
    steps = np.arange(BUCKET, dtype=np.int32)[None]
    positions = jnp.asarray(np.where(steps < np.asarray(LENGTHS)[:, None], steps, -1))
    step = jax.jit(functools.partial(model.apply, logits_at="last"))
    logits, cache = step({"params": params}, jnp.asarray(ids), positions, cache)
    tokens = []
    for _ in range(24):
        tokens.append(np.asarray(jnp.argmax(logits[:, 0], axis=-1)))
        logits, cache = step({"params": params}, jnp.asarray(tokens[-1][:, None]), None, cache)
    return np.stack(tokens, axis=1).tolist()


def test_full_keeps_the_window_of_sliding_layers():
    assert run("sliding", "full").tokens == dense("sliding")
    _, cache = read("sliding", "full")
    assert isinstance(cache[0], DenseCache) and isinstance(cache[1], PoolLayer)
    assert cache.pools[0].k.shape[1] == bucket_rows(2 * 13)  # one window a head


CASES = [
    *[("gqa", name) for name in MAKERS if name != "full"],
    ("sliding", "adasnapkv"),
    ("after_up", "expected"),
    ("mla", "h2o"),
]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_budget_of_everything_loses_nothing(kind, name):
    assert run(kind, f"{name}:kv_size=200").tokens == dense(kind)


def test_expected_attention_refuses_latents():
    with pytest.raises(NotImplementedError, match="needs keys of heads"):
        run("mla", "expected:kv_size=200")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("gqa", "headkv"),
        ("gqa", "adasnapkv"),
        ("before_up", "h2o"),
        ("after_up", "headkv"),
        ("mla", "snapkv"),
    ],
)
def test_small_budgets_hold_their_bytes(kind, name):
    model, _ = build(kind)
    _, cache = read(kind, f"{name}:kv_size=16")
    expected = {"after_up": DenseCache, "mla": LatentCache}.get(kind, PoolLayer)
    assert all(isinstance(layer, expected) for layer in cache)
    each = token_bytes(model.config.layers[0].attention, "float32")
    nominal, room = 2 * 16 * each, 2 * room_bucket(4) * each
    assert nominal <= cache_bytes(cache) / 3 - room <= 1.12 * nominal + 700  # and tables


@pytest.mark.parametrize(
    ("kind", "policy"),
    [("gqa", "expected"), ("sliding", "adasnapkv"), ("after_up", "headkv"), ("mla", "h2o")],
)
def test_the_chunk_of_prefill_changes_no_selection(monkeypatch, kind, policy):
    asked = kind, f"{policy}:kv_size=16", (64, 33, 5)
    one = read(*asked)
    chunked = functools.partial(read_layer, chunk=24)
    monkeypatch.setattr(sys.modules["kvjax.prefilling"], "read_layer", chunked)
    many = read(*asked)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize(
    ("kind", "entries"),
    [
        ("gqa", "fp8"),
        ("sliding", "int8"),
        ("mla", "int8"),
        ("sliding", "int4"),
        ("mla", "int4"),
    ],
)
def test_smaller_entries_under_any_policy(kind, entries):
    exact, coarse = run(kind, "full"), run(kind, f"full:entries={entries}")
    assert coarse.cache_bytes < 0.5 * exact.cache_bytes  # fp32 to at most 8 bits and 4 bytes a row
    same = np.mean(np.asarray(exact.tokens)[:, :3] == np.asarray(coarse.tokens)[:, :3])
    assert same > 0.6
    small = run(kind, f"snapkv:kv_size=16,entries={entries}")
    assert small.cache_bytes < 0.5 * run(kind, "snapkv:kv_size=16").cache_bytes


@pytest.mark.parametrize("name", ["headkv", "adasnapkv"])
def test_compression_while_decoding(name):
    """Without anything to evict it changes nothing; with a budget the cache stops growing."""
    assert run("gqa", f"{name}:kv_size=200,compression_interval=7").tokens == dense("gqa")
    small = run("gqa", f"{name}:kv_size=16,compression_interval=8", new=60)
    longer = run("gqa", f"{name}:kv_size=16,compression_interval=8", new=90)
    assert longer.cache_bytes == small.cache_bytes
    assert [row[:60] for row in longer.tokens] == small.tokens
    with pytest.raises(NotImplementedError, match="compressed again"):
        run("mla", "snapkv:kv_size=16,compression_interval=8")
    with pytest.raises(NotImplementedError, match="watches the prompt"):
        run("gqa", "h2o:kv_size=16,compression_interval=8")


@dataclasses.dataclass(frozen=True)
class SeesTwelve:
    """A scorer that looks at twelve queries, whatever the policy keeps."""

    queries: int = 12

    def __call__(self, view):
        assert view.queries.shape[1] == self.queries
        return by_kv_head(query_attention(view).sum(axis=2), view.keys.shape[1])


@pytest.mark.parametrize("interval", [0, 6])
def test_a_scorer_may_see_other_queries_than_those_of_the_tokens_that_stay(interval):
    model, params = build("gqa")
    policy = Compress(Uniform(), SeesTwelve(), 6, observed=4, compression_interval=interval)
    budgets, _ = policy.budgets(model.config, LENGTHS, 8, "float32")
    assert (budgets.observed, budgets.recent.tolist()) == (12, [4] * len(LENGTHS))
    _, cache = read("gqa", policy)
    assert (np.asarray(cache.pools[0].kept) == 6).all()
    generate(model, params, prompts(), 8, policy=policy, eos_ids=())


def test_a_ring_bounds_the_growth_of_low_budget_heads():
    wide = run("gqa", "headkv:kv_size=16", new=60)
    ring = run("gqa", "headkv:kv_size=16,ring=8", new=60)
    assert ring.cache_bytes < wide.cache_bytes
    assert all(len(row) == 60 for row in ring.tokens)


def test_sizes_in_tokens_ratio_and_bytes():
    model, _ = build("gqa")
    for size in ("kv_size=16", "ratio=0.25", f"bytes={16 * 2 * 2 * 2 * 8 * 4}"):
        policy = resolve(f"snapkv:{size}", model.config, None)
        caps, window = policy.caps(model.config, 64, "float32")
        np.testing.assert_array_equal(caps, [[8, 8], [8, 8]])
        assert window == 8
    # In 4 bits: rows of 4 bytes and a range, and two numbers of 2 bytes for each channel of keys.
    policy = resolve(f"snapkv:bytes={2 * 2 * (16 * 2 * (4 + 4) + 8 * 4)}", model.config, None)
    np.testing.assert_array_equal(policy.caps(model.config, 64, "int4")[0], [[8, 8], [8, 8]])
    with pytest.raises(ValueError, match="kv_size is 3 and observed is 8"):
        resolve("snapkv:bytes=1000", model.config, None).caps(model.config, 64, "float32")


@pytest.mark.parametrize("kind", ["gqa", "mla"])
@pytest.mark.parametrize("name", ["snapkv", "headkv", "adasnapkv", "pyramidkv", "h2o"])
def test_a_ratio_is_a_share_of_the_prompt_and_not_of_its_bucket(name, kind):
    """Buckets hold 48 and 96 tokens."""
    model, params = build(kind)
    policy = resolve(f"{name}:ratio=0.5,observed=4", model.config, SCORES)
    for each in ((33, 40, 48), (65, 80, 96)):
        texts = [np.random.default_rng(n).integers(0, 61, n).tolist() for n in each]
        tokens, lengths = pad(texts, each[-1])
        _, cache = prefill(model, params, tokens, lengths, policy, 4)
        if kind == "gqa":
            kept = np.mean([layer.live(layer.given()) for layer in cache], axis=(0, 2))
        else:
            kept = np.mean([lengths - np.asarray(layer.evicted) for layer in cache], axis=0)
        assert (np.abs(kept - lengths / 2) <= 1).all(), kept


def test_a_ratio_keeps_what_so_many_tokens_would():
    model, params = build("gqa")
    text = [np.random.default_rng(3).integers(0, 61, 34).tolist()]
    settings = {"max_new_tokens": 24, "eos_ids": ()}
    got, want = (
        generate(model, params, text, policy=f"snapkv:{size},observed=4", **settings).tokens
        for size in ("ratio=0.5", "kv_size=17")
    )
    assert got == want
    bucket = generate(model, params, text, policy="snapkv:kv_size=24,observed=4", **settings).tokens
    assert got != bucket


@pytest.mark.parametrize("n", [1, 7, 8, 16, 17, 32])
@pytest.mark.parametrize("name", ["headkv", "adasnapkv"])
def test_prompts_around_the_window_and_the_budget(name, n):
    model, params = build("gqa")
    # Beside prompts of other lengths: the programs are those of the other tests.
    batch = [np.random.default_rng(n).integers(0, 61, n).tolist(), *prompts()[:3]]
    settings = {"max_new_tokens": 8, "eos_ids": ()}
    policy = resolve(f"{name}:kv_size=16", model.config, SCORES)
    got = generate(model, params, batch, policy=policy, **settings).tokens[0]
    if n <= 16:  # budgets follow the prompt's own length: nothing is left out
        assert got == generate(model, params, batch, **settings).tokens[0]
    assert len(got) == 8


def test_thirty_three_sequences_of_thirty_three_lengths():
    model, params = build("gqa")
    rng = np.random.default_rng(5)
    many = [rng.integers(0, 61, n).tolist() for n in range(1, 34)]
    policy = resolve("headkv:kv_size=16", model.config, SCORES)
    settings = {"max_new_tokens": 6, "policy": policy, "eos_ids": ()}
    together = generate(model, params, many, **settings).tokens
    for index in (0, 8, 16, 32):
        assert generate(model, params, [many[index]], **settings).tokens[0] == together[index]
