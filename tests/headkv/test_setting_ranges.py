"""Numbers of policies, budgets and sampling: NaN, infinity and other ranges are refused."""

import numpy as np
import pytest

from kvjax.decoding import Sampling
from kvjax.headkv import allocate
from kvjax.policies.budgets import Adaptive, HeadImportance, Pyramid, Uniform
from kvjax.policies.named import parse_policy
from kvjax.policies.observers import ExpectedAttention
from kvjax.policies.policy import Compress
from kvjax.policies.scorers import ObservationWindow, SinksAndRecent, SpanWindow

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "text, message",
    [
        ("snapkv:ratio=nan", "ratio is nan, expected a finite number above 0 and of at most 1"),
        ("snapkv:ratio=inf", "ratio is inf"),
        ("snapkv:ratio=-0.5", "ratio is -0.5"),
        ("snapkv:ratio=1.5", "ratio is 1.5"),
        ("snapkv:kv_size=-5", "kv_size is -5"),
        ("snapkv:kv_size=nan", "kv_size is 'nan', expected a whole number"),
        ("snapkv:bytes=-1", "nbytes is -1"),
        ("snapkv:observed=0", "observed is 0, expected a whole number from 1"),
        ("snapkv:observed=-8", "observed is -8"),
        ("snapkv:ring=-1", "ring is -1"),
        ("snapkv:compression_interval=-1", "compression_interval is -1"),
        ("snapkv:kernel_size=0", "kernel_size is 0"),
        ("snapkv:pool=9999999", "kernel_size is 9999999, expected a whole number from 1 to 1024"),
        ("spankv:ahead=9999999", "ahead is 9999999, expected a whole number from 0 to 1024"),
        ("expected:future=9999999", "future is 9999999, expected a whole number from 1 to 8192"),
        ("snapkv:kv_size=64,kv_size=128", "kv_size is given twice"),
        ("spankv:fade=nan", "fade is nan"),
        ("spankv:ahead=-1", "ahead is -1"),
        ("spankv:behind=-1", "behind is -1"),
        ("streaming:n_sink=-4", "n_sink is -4"),
        ("expected:future=0", "future is 0"),
        ("pyramidkv:beta=nan", "beta is nan"),
        ("pyramidkv:beta=inf", "beta is inf"),
        ("pyramidkv:beta=0", "beta is 0.0"),
        ("pyramidkv:beta=-20", "beta is -20.0"),
        ("adasnapkv:alpha=nan", "alpha is nan"),
        ("adasnapkv:alpha=1.5", "alpha is 1.5"),
        ("h2o:recent_share=nan", "recent_share is nan"),
        ("h2o:recent_share=1", "recent_share is 1.0"),
        ("headkv:beta=nan", "beta is nan, expected a finite number of at least 1"),
        ("headkv:beta=inf", "beta is inf"),
        ("headkv:beta=-1", "beta is -1.0"),
        ("headkv:fade=inf", "fade is inf"),
        ("headkv_paper:beta=nan", "beta is nan"),
        ("headkv_paper:beta=0.5", "beta is 0.5"),
        ("headkv_adaptive:alpha=-0.1", "alpha is -0.1"),
    ],
)
def test_policies_by_name(text, message):
    with pytest.raises(ValueError, match=message):
        parse_policy(text)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Compress(Uniform(), ObservationWindow(), kv_size=0, ratio=NAN),
        lambda: Compress(Uniform(), ObservationWindow(), recent_share=NAN),
        lambda: Compress(Uniform(), ObservationWindow(), observed=True),
        lambda: Compress(Uniform(), ObservationWindow(), kv_size=True),
        lambda: Pyramid(NAN),
        lambda: HeadImportance(NAN),
        lambda: HeadImportance(0.0),
        lambda: Adaptive(NAN),
        lambda: SpanWindow(fade=NAN),
        lambda: SinksAndRecent(True),
        lambda: ExpectedAttention(-1),
    ],
)
def test_policies_in_code(make):
    with pytest.raises(ValueError, match=r"is (nan|0\.0|True|-1), expected a "):
        make()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"beta": NAN}, "beta is nan, expected a finite number of at least 1"),
        ({"beta": INF}, "beta is inf"),
        ({"kv_size": True}, "kv_size is True"),
        ({"kv_size": -1, "window": -8}, "kv_size is -1, .*; window is -8"),
        ({"num_kv_heads": 0}, "num_kv_heads is 0"),
        ({"prompt_len": -1}, "prompt_len is -1"),
    ],
)
def test_budgets(changes, message):
    scores = np.ones((2, 4))
    with pytest.raises(ValueError, match=message):
        allocate(scores, **{"kv_size": 16, "window": 8, "num_kv_heads": 2, **changes})


def test_scores_whose_sum_overflows():
    """Each of them is finite; a share of an infinite sum would be 0."""
    with pytest.raises(ValueError, match="NaN or infinite"):
        allocate(np.full((2, 4), 1e308), 16, 8, num_kv_heads=2)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"temperature": NAN}, "temperature is nan, expected a finite number of at least 0"),
        ({"temperature": INF}, "temperature is inf"),
        ({"temperature": 1e39}, r"temperature is 1e\+39 \(inf in float32\)"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_k": True}, "top_k is True, expected a whole number"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": NAN}, "top_p is nan"),
        ({"top_p": INF}, "top_p is inf"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1e-50}, r"top_p is 1e-50 \(0.0 in float32\)"),
        ({"top_p": 1.5, "temperature": NAN}, "temperature is nan.*; top_p is 1.5"),
    ],
)
def test_sampling(changes, message):
    with pytest.raises(ValueError, match=message):
        Sampling.create(**{"temperature": 1.0, "top_k": 0, "top_p": 1.0, **changes})


@pytest.mark.parametrize("top_k", [2**31, 2**40, 10**30])
def test_a_top_k_beyond_int32_is_all_tokens(top_k):
    assert Sampling.create(1.0, top_k, 1.0).top_k == 2**31 - 1
