"""The joint PCA: its error, its metrics, and means that cost nothing."""

import numpy as np
import pytest

from kvjax.transmla import closed_form

n, V = 5, 6


def draw(seed=0, mean=0.0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((400, n + V)) @ rng.standard_normal((n + V, n + V)) + mean
    a, b = rng.standard_normal((n, n)), rng.standard_normal((V, V))
    return x, a @ a.T, b @ b.T


def moments(x, key, value, centred=True):
    mean = x.mean(0) if centred else np.zeros(n + V)
    return closed_form.JointMoments((x - mean).T @ (x - mean) / len(x), mean, key, value)


@pytest.mark.parametrize("metric", [closed_form.aware, closed_form.balanced, closed_form.plain])
@pytest.mark.parametrize("rank", [1, 4, n + V])
def test_the_error_is_the_tail_of_the_eigenvalues(rank, metric):
    x, *metrics = draw(mean=3.0)
    m = moments(x, *metrics)
    low = closed_form.joint_pca(m, metric, rank)
    root = metric(m)
    rest = (x - (x @ low.down @ low.up + low.constant)) @ root
    tail = np.sort(np.linalg.eigvalsh(root.T @ m.covariance @ root))[: n + V - rank].sum()
    np.testing.assert_allclose((rest**2).sum() / len(x), tail, rtol=1e-7, atol=1e-9)
    assert low.down.shape == (n + V, rank) and low.up.shape == (rank, n + V)


def test_a_mean_changes_nothing_where_it_is_centred():
    x, *metrics = draw()
    shift = np.arange(n + V) * 5.0
    a = closed_form.joint_pca(moments(x, *metrics), closed_form.aware, 3)
    b = closed_form.joint_pca(moments(x + shift, *metrics), closed_form.aware, 3)
    np.testing.assert_allclose(a.down @ a.up, b.down @ b.up, atol=1e-8)
    one = x @ a.down @ a.up + a.constant
    two = (x + shift) @ b.down @ b.up + b.constant
    np.testing.assert_allclose(two - one, np.broadcast_to(shift, x.shape), atol=1e-7)


def test_balanced_divides_keys_by_the_ratio_of_the_norms():
    x, *metrics = draw()
    norms = np.linalg.norm(x, axis=0)
    root = closed_form.balanced(moments(x, *metrics, centred=False))
    ratio = norms[:n].mean() / norms[n:].mean()
    np.testing.assert_allclose(np.diag(root), [1 / ratio] * n + [1.0] * V)


def test_a_metric_that_sees_nothing_can_be_inverted():
    x, _, value = draw()
    for key in (np.zeros((n, n)), np.diag([1.0, 0, 0, 0, 0])):
        low = closed_form.joint_pca(moments(x, key, value), closed_form.aware, n + V)
        np.testing.assert_allclose(low.down @ low.up, np.eye(n + V), atol=2e-5)
    only_values = closed_form.JointMoments(np.eye(V), np.zeros(V), np.zeros((0, 0)), value)
    for metric in (closed_form.aware, closed_form.balanced):
        low = closed_form.joint_pca(only_values, metric, V)
        np.testing.assert_allclose(low.down @ low.up, np.eye(V), atol=1e-9)
