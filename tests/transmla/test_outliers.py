"""Conversions of models with massive activations and large key biases, as trained models have."""

import dataclasses

import jax
import numpy as np
import pytest
from calibrated_toys import build, error, forward

from kvjax.transmla import BEST, UNBIASED, calibrate, convert, published
from kvjax.transmla.closed_form import JointMoments, balanced
from kvjax.transmla.output_equations import lifted_solve
from kvjax.transmla.roots import Root

CLOSED = dataclasses.replace(BEST, refit=False)
SIZES = {"kv_rank": 18, "rope_dim": 8}
RECIPES = {"best": BEST, "closed": CLOSED, "unbiased": UNBIASED, "published": published(1)}


def with_outliers(dtype):
    """A toy whose token 0 has a channel 1000 times larger than all others, and large key biases."""
    model, params, stats, tokens, _ = build("qwen2")
    params = jax.tree.map(lambda leaf: leaf, params)  # new dicts
    params["embedding"] = params["embedding"].at[0, 3].set(1000.0)
    for name in ("layers_0", "layers_1"):
        bias = params[name]["attn"]["k_bias"]
        params[name]["attn"]["k_bias"] = bias.at[:, 0].add(100.0)
    ids = [
        np.where(np.arange(x.shape[1]) == 0, 0, x).astype(np.int32) for x in (stats.tokens, tokens)
    ]
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    return model, params, *ids


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_outliers_leave_every_recipe_finite_and_the_best_close(dtype):
    model, params, calibration, tokens = with_outliers(dtype)
    want = forward(model, params, tokens).astype(np.float32)
    stats = calibrate(model, params, [calibration])
    errors = {}
    for name, recipe in RECIPES.items():
        new = convert(model, params, "decoupled", stats=stats, recipe=recipe, **SIZES)
        got = forward(*new, tokens).astype(np.float32)
        assert np.isfinite(got).all()
        errors[name] = np.square(got - want).mean() / np.square(want).mean()
    assert errors["best"] < 0.6 * errors["published"]


@pytest.mark.parametrize("rows", [1, 8])
def test_one_repeated_token_says_nothing_and_breaks_nothing(rows):
    model, params, _, tokens = with_outliers("float32")
    same = np.full((rows, tokens.shape[1]), 7, np.int32)
    stats = calibrate(model, params, [same])
    for recipe in (BEST, UNBIASED):
        new = convert(model, params, "decoupled", stats=stats, recipe=recipe, **SIZES)
        assert np.isfinite(forward(*new, tokens)).all()
        assert error(forward(*new, same), forward(model, params, same)) < 0.05


def test_balanced_keys_and_values_that_rounding_left_below_zero():
    covariance = np.diag([-1e-18, 4.0, 1.0, -1e-18])
    moments = JointMoments(covariance, np.zeros(4), np.eye(2), np.eye(2))
    np.testing.assert_allclose(balanced(moments), np.diag([0.5, 0.5, 1.0, 1.0]))


def test_a_root_of_channels_of_all_sizes():
    rng = np.random.default_rng(0)
    sizes = 10.0 ** np.linspace(-3, 3, 6)
    x = sizes * (rng.standard_normal((200, 6)) @ rng.standard_normal((6, 6)))
    root = Root.of(x.T @ x)
    white = x @ root.inverse
    np.testing.assert_allclose(white.T @ white, np.eye(6), atol=1e-8)
    np.testing.assert_allclose(root.root @ root.inverse, np.eye(6), atol=1e-8)
    # Dead channels, repeated ones and no rows at all have roots too.
    x[:, 2], x[:, 3] = 0.0, x[:, 4]
    for gram in (x.T @ x, np.zeros((6, 6))):
        root = Root.of(gram)
        assert np.isfinite(root.root).all() and np.isfinite(root.inverse).all()
        np.testing.assert_allclose(root.root @ root.inverse, np.eye(6), atol=1e-6)


def test_a_matrix_that_rounding_made_indefinite_is_solved():
    gram = np.diag([1.0, -1e-7])
    solved = lifted_solve(gram, np.ones((2, 1)), 1e-9)
    assert np.isfinite(solved).all()
    np.testing.assert_allclose(solved[0], 1.0, rtol=1e-4)
