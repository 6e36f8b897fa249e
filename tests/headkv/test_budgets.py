"""Budgets: the published code's numbers, exact sums, and the invariants of water-filling."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.config import GQAConfig, LayerConfig, MLPConfig, ModelConfig
from kvjax.headkv import HeadScores, allocate, load_scores
from kvjax.policies.budgets import (
    HeadImportance,
    Request,
    normalise,
    real_caps,
    water_fill,
)
from kvjax.policies.compression import Budgets, kept_tokens

LLAMA, MISTRAL = "Meta-Llama-3-8B-Instruct", "Mistral-7B-Instruct-v0.2"
# model, C, β, SHA-1 of the published code's budgets, SHA-1 of the KV heads' budgets
GOLDENS = [
    (LLAMA, 64, 1.2, "6271813be83d", "b090c026b413"),
    (LLAMA, 128, 1.01, "9794845a6f15", "581c2c9e24de"),
    (LLAMA, 256, 1.1, "87a962cc1528", "80a0a833225a"),
    (LLAMA, 512, 1.1, "1a0b95e5ba58", "8145a973aedc"),
    (LLAMA, 1024, 1.2, "63e30deb8f4d", "9b117facacdf"),
    (MISTRAL, 64, 1.2, "b34d5413a682", "d3ddbad20e21"),
    (MISTRAL, 128, 1.1, "85ffce2321c1", "532cabd5e6ca"),
    (MISTRAL, 256, 1.005, "2d00ede50531", "356b5e12fc7c"),
    (MISTRAL, 512, 1.005, "64f77630716f", "ea961a8463c1"),
    (MISTRAL, 1024, 1.01, "bc72d0d09200", "7aba6f205e53"),
]


def sha1(caps):
    return hashlib.sha1(np.ascontiguousarray(caps, "<i4").tobytes()).hexdigest()[:12]


@pytest.fixture(scope="module")
def published(data_dir):
    folder = data_dir / "head_scores" / "headkv"
    return {
        model: load_scores(folder / f"{model}_retrieval_reasoning_heads.json.gz")
        for model in (LLAMA, MISTRAL)
    }


@pytest.mark.data
@pytest.mark.parametrize("model, kv_size, beta, reference, kv_head", GOLDENS)
def test_goldens(published, model, kv_size, beta, reference, kv_head):
    scores = published[model]
    caps = allocate(scores, kv_size, beta=beta, compat="reference")
    assert caps.dtype == np.int32 and caps.shape == (32, 32)
    assert sha1(caps) == reference
    caps = allocate(scores, kv_size, beta=beta)
    assert caps.dtype == np.int32 and caps.shape == (32, 8)
    assert sha1(caps) == kv_head
    assert caps.sum() == (kv_size - 8) * 32 * 8


@pytest.mark.data
@pytest.mark.parametrize(
    "kv_size, beta, kept, largest, total",
    [
        (64, 1.2, 10, 719, 57320),
        (128, 1.01, 2, 1821, 122864),
        (256, 1.1, 23, 3491, 253949),
        (512, 1.1, 46, 7105, 516107),
        (1024, 1.2, 170, 13208, 1040386),
    ],
)
def test_reference_sums(published, kv_size, beta, kept, largest, total):
    caps = allocate(published[LLAMA], kv_size, beta=beta, compat="reference")
    assert caps.min() == kept and caps.max() == largest and caps.sum() == total
    assert np.unravel_index(caps.argmax(), caps.shape) == (15, 30)


def test_reference_clips_and_evicts_nothing_from_a_short_prompt():
    scores = np.array([[0.9, 0.1], [0.0, 0.0]])
    caps = allocate(scores, 28, beta=2.0, prompt_len=38, compat="reference")
    np.testing.assert_array_equal(caps, [[30, 14], [10, 10]])
    caps = allocate(scores, 28, beta=2.0, prompt_len=27, compat="reference")
    np.testing.assert_array_equal(caps, np.full((2, 2), 19))


def test_water_filling_by_hand():
    scores = np.array([[6.0, 3.0], [1.0, 0.0]])
    # m = 10, pool = 40: real budgets 34, 22, 14, 10; the first is cut at 30 and its 4 go 3 : 1.
    caps = allocate(scores, 28, beta=2.0, num_kv_heads=2, prompt_len=38)
    np.testing.assert_array_equal(caps, [[30, 25], [15, 10]])


SCORES = st.integers(0, 2**32 - 1).map(
    lambda seed: np.random.default_rng(seed).random((3, 4)) ** 6 * 0.9
)
BETAS = st.floats(1.0, 20.0)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(SCORES, BETAS, st.integers(9, 400), st.integers(1, 300))
def test_sums_are_exact_and_nothing_exceeds_the_prompt(scores, beta, kv_size, prompt_len):
    limit = max(prompt_len - 8, 0)
    caps = allocate(scores, kv_size, beta=beta, num_kv_heads=2, prompt_len=prompt_len)
    assert caps.shape == (3, 2)
    assert caps.min() >= 0 and caps.max() <= limit
    assert caps.sum() == min(kv_size - 8, limit) * 6
    free = allocate(scores, kv_size, beta=beta, num_kv_heads=2)
    assert free.sum() == (kv_size - 8) * 6


@settings(max_examples=200, deadline=None, derandomize=True)
@given(SCORES, BETAS, st.integers(9, 200), st.integers(1, 30), st.integers(9, 250))
def test_a_larger_kv_size_takes_nothing_from_a_head(scores, beta, kv_size, more, prompt_len):
    limit, shares = prompt_len - 8, normalise(scores)

    def real(size):
        limits = np.full((3, 4), limit)
        return water_fill(real_caps(shares, size - 8, beta), shares, limits, (size - 8) * 12)

    assert (real(kv_size + more) >= real(kv_size) - 1e-9).all()
    small, large = (
        allocate(scores, size, beta=beta, num_kv_heads=4, prompt_len=prompt_len)
        for size in (kv_size, kv_size + more)
    )
    assert large.sum() >= small.sum() and (large >= small - 1).all()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(SCORES, BETAS, st.integers(9, 200), st.integers(1, 300), st.integers(1, 50))
def test_the_total_grows_with_the_prompt(scores, beta, kv_size, prompt_len, more):
    totals = [
        allocate(scores, kv_size, beta=beta, num_kv_heads=4, prompt_len=n).sum()
        for n in (prompt_len, prompt_len + more)
    ]
    assert totals[0] <= totals[1]


def test_all_zero_scores_share_equally():
    caps = allocate(np.zeros((3, 4)), 20, num_kv_heads=4, prompt_len=100)
    np.testing.assert_array_equal(caps, np.full((3, 4), 12))


def test_one_huge_head_saturates_and_the_rest_share_what_is_left():
    scores = np.zeros((2, 4))
    scores[1, 2] = 5.0
    caps = allocate(scores, 48, num_kv_heads=4, prompt_len=58, beta=1.25)
    assert caps[1, 2] == 50 and caps.sum() == 40 * 8
    others = np.delete(caps.ravel(), 6)
    assert others.max() - others.min() <= 1


@pytest.mark.parametrize(
    ("budget", "floor"), [(1, 1), (4, 1), (8, 2), (16, 4), (24, 4), (40, 7), (200, 100)]
)
def test_every_head_gets_a_few_tokens_by_default(budget, floor):
    samples = np.zeros((3, 4, 1))
    samples[1, 2] = 1.0
    caps = HeadImportance(scores=HeadScores(samples))(Request(3, 4, budget + 8, 8, 10**6))
    assert caps.sum() == 12 * budget
    others = np.delete(caps.ravel(), 6)
    assert (others == floor).all(), caps


def test_query_head_granularity():
    caps = allocate(np.arange(12.0).reshape(3, 4), 20, granularity="query_head")
    assert caps.shape == (3, 4) and caps.sum() == 12 * 12


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"kv_size": 8}, "kv_size is 8 and window is 8"),
        ({"kv_size": 3, "window": 5}, "kv_size is 3 and window is 5"),
        ({"beta": 0.5}, "beta is 0.5"),
        ({"beta": float("nan")}, "beta is nan"),
        ({"num_kv_heads": 3}, "num_kv_heads is 3, expected a divisor of the 4 query heads"),
        ({"granularity": "layer"}, "granularity is 'layer'"),
        ({"compat": "paper"}, "compat is 'paper'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        allocate(np.ones((2, 4)), **({"num_kv_heads": 2} | arguments))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_bad_scores(bad):
    scores = np.ones((2, 4))
    scores[1, 1] = bad
    with pytest.raises(ValueError, match="negative, NaN or infinite"):
        allocate(scores, num_kv_heads=2)


def test_kept_tokens_of_a_shorter_prompt():
    layer = LayerConfig(GQAConfig(2, 2, 4, 0.5, None), MLPConfig(8))
    config, caps = ModelConfig("llama", 8, 8, (layer,)), np.array([[[30, 5]]])
    budgets = Budgets(caps, np.array([8]), rooms=0 * caps, rings=caps > 99, scorer=None)
    np.testing.assert_array_equal(kept_tokens(config, budgets, np.array([20])), [[[20, 13]]])
    np.testing.assert_array_equal(kept_tokens(config, budgets, np.array([6])), [[[6, 6]]])
