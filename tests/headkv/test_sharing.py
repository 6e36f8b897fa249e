"""Ada-KV's sharing of a layer's budget against a sort in plain NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.policies.budgets import Adaptive


def oracle(scores, candidates, caps, alpha):
    """Counts before rounding, and their sum; scores [K, n] of candidates only."""
    n = len(candidates)
    total = min(sum(caps), len(caps) * n)
    order = sorted(
        ((-scores[k, s], k, s) for k in range(len(caps)) for s in range(n)),
    )[:total]
    best = np.bincount([k for _, k, _ in order], minlength=len(caps))
    return best * (1 - alpha) + np.minimum(caps, n) * alpha, total


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**31),
    st.lists(st.integers(0, 12), min_size=4, max_size=4),
    st.sampled_from([0.0, 0.2, 1.0]),
    st.integers(0, 16),
)
def test_counts(seed, caps, alpha, candidates):
    rng = np.random.default_rng(seed)
    scores = rng.permutation(4 * 16).reshape(4, 16).astype(np.float32)
    mask = np.arange(16) < candidates
    counts = Adaptive(alpha)(jnp.asarray(scores)[None], jnp.asarray(mask)[None, None], tuple(caps))
    counts = np.asarray(counts)[0]
    real, total = oracle(scores[:, :candidates], range(candidates), caps, alpha)
    assert np.abs(counts - real).max() < 1 + 1e-4
    assert counts.sum() <= total and counts.max() <= candidates
    assert counts.sum() == round(real.sum())


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_extremes(alpha):
    scores = jnp.asarray([[[9.0, 8.0, 7.0, 6.0], [1.0, 1.0, 1.0, 1.0]]])
    counts = Adaptive(alpha)(scores, jnp.ones((1, 1, 4), bool), (2, 2))
    np.testing.assert_array_equal(counts, [[2, 2]] if alpha else [[4, 0]])
