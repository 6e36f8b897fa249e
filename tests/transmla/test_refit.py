"""The least squares after the closed form, against plain solvers in fp64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import random_params

from kvjax.config import GQAConfig, LayerConfig, MLPConfig, ModelConfig, RopeConfig
from kvjax.nn import Transformer
from kvjax.nn.layers import Turn
from kvjax.nn.transformer import attention_output, block_kind
from kvjax.transmla import BEST, calibrate, refit_outputs, refit_queries
from kvjax.transmla.closed_form import close
from kvjax.transmla.layer import CacheMaps, QueryMaps
from kvjax.transmla.output_equations import HeadMaps, Normal, Rows

GQA = GQAConfig(2, 1, 8, 8**-0.5, RopeConfig(8), window=9, softcap=30.0)
S, T, D, L, R = 24, 16, 12, 6, 4
ONES = jnp.ones((S, T), jnp.float32)
EYES = np.stack([np.eye(L)] * 2)


@pytest.fixture(scope="module")
def problem():
    layer = LayerConfig(GQA, MLPConfig(16))
    model = Transformer(ModelConfig("llama", vocab_size=50, hidden_size=D, layers=(layer,)))
    params = random_params(model)
    tokens = np.random.default_rng(0).integers(0, 50, (S, T)).astype(np.int32)
    stats = calibrate(model, params, [tokens])
    own = params["layers_0"]
    latent = close(GQA, own["attn"], stats.layers[0], L, R, BEST)
    original = params["embedding"][tokens]
    noise = 0.1 * np.random.default_rng(1).standard_normal(original.shape)
    return (
        block_kind(model.config, layer).block,
        own,
        latent,
        original,
        original + jnp.asarray(noise, jnp.float32),
    )


def score_problem(block, own, latent, original, converted):
    """Weighted, centred features and targets of head 0: rows √w·(z ⊗ q) and √w·s."""
    at = refit_queries.query_positions(T, T)
    arrays = own, Turn.of(latent.rope), CacheMaps.of(latent), jnp.asarray(at)

    def one(a, b):
        return refit_queries.logit_data(block, *arrays, a, b)

    data = jax.jit(jax.vmap(one))(original, converted)
    rows, targets = [], []
    inverse = 10_000.0 ** (-np.arange(4) / 4)[list(latent.rope.scaling.pairs)]
    for s in range(S):
        d = jax.tree.map(lambda x, s=s: np.asarray(x[s], np.float64), data)
        for t in range(T):
            weight = d.weights[0, t]
            # Seen from the query, a rotary key is turned back by the query's position.
            half = R // 2
            z = (d.k_rope[:, :half] + 1j * d.k_rope[:, half:]) * np.exp(-1j * at[t] * inverse)
            key = np.concatenate([d.c, z.real, z.imag], axis=1)
            features = np.einsum("sz,h->szh", key, d.q[t, 0]).reshape(T, -1) * GQA.scale
            features -= weight @ features
            target = d.target[0, t] - weight @ d.target[0, t]
            rows.append(np.sqrt(weight)[:, None] * features)
            targets.append(np.sqrt(weight) * target)
    return np.concatenate(rows), np.concatenate(targets)


def test_scores_are_the_weighted_least_squares(problem, monkeypatch):
    monkeypatch.setattr(refit_queries, "RIDGE", 0.0)
    monkeypatch.setattr(refit_queries, "ITERATIONS", 300)
    features, target = score_problem(*problem)
    block, own, latent, original, converted = problem
    fitted = refit_queries.refit_queries(block, own, latent, original, converted)

    def error(layer):
        k_up = layer.k_up[:, 0]  # [L, H]
        weights = np.concatenate([k_up, layer.query_rope[0].T]).reshape(-1)
        return ((features @ weights - target) ** 2).sum()

    best = np.linalg.lstsq(features, target, rcond=1e-9)[0]
    least = ((features @ best - target) ** 2).sum()
    assert least <= error(fitted) <= 1.01 * least
    assert error(latent) > 1.2 * least
    np.testing.assert_array_equal(fitted.down, latent.down)


def groups(block, own, latent, converted, target):
    maps = CacheMaps.of(latent), QueryMaps.of(latent), Turn.of(latent.rope)
    return refit_outputs.feature_groups(block, own, *maps, converted, target, ONES)


def test_outputs_are_the_least_squares(problem, monkeypatch):
    monkeypatch.setattr(refit_outputs, "PULLS", (1e-9,))
    block, own, latent, original, converted = problem
    target = attention_output(block, own, None, original)
    equations = Normal.of(groups(block, own, latent, converted, target), EYES, D)
    gram, product, square = equations.gram, equations.product, equations.square
    assert square == pytest.approx(float((np.asarray(target, np.float64) ** 2).sum()))

    def error(fitted):
        whole = np.einsum("lnv,nvd->nld", fitted.v_up, fitted.out).reshape(-1, D)
        whole = np.concatenate([whole, fitted.out_bias[None]])
        fit = np.einsum("fd,fg,gd->", whole, gram, whole) - 2 * (whole * product).sum()
        return fit + square

    args = (block, own, latent, converted, target, ONES)
    whole = refit_outputs.refit_outputs(*args, v_head_dim=L)
    best = np.linalg.solve(gram, product)
    least = square - (best * product).sum()
    assert error(whole) == pytest.approx(least, rel=1e-3)
    narrow = [refit_outputs.refit_outputs(*args, v_head_dim=3, sweeps=n) for n in (0, 1, 6)]
    errors = [error(n) for n in narrow]
    assert errors[0] > errors[1] > errors[2] >= least and error(latent) > least
    assert narrow[0].v_up.shape == (L, 2, 3) and narrow[0].out.shape == (2, 3, D)


def test_factors_of_a_given_width_are_the_best():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((200, 6)) @ rng.standard_normal((6, 6))
    weight = rng.standard_normal((6, 5))
    for width in (1, 3, 5, 8):
        a, b = refit_outputs.factor(features.T @ features, weight, width)
        assert a.shape == (6, width) and b.shape == (width, 5)
        tail = np.linalg.svd(features @ weight, compute_uv=False)[width:]
        error = ((features @ (weight - a @ b)) ** 2).sum()
        np.testing.assert_allclose(error, (tail**2).sum(), rtol=1e-5, atol=1e-5)


def test_factors_of_features_that_differ_in_size_and_hardly_in_direction():
    """Most attention on one token with a large latent: relative to it, all else is rounding."""
    rng = np.random.default_rng(0)
    sizes = 10.0 ** rng.uniform(-2, 2, 12)
    features = sizes * (1 + 1e-4 * rng.standard_normal((400, 12)))
    features = features.astype(np.float32).astype(np.float64)
    weight = rng.standard_normal((12, 20)) / sizes[:, None]
    gram = features.T @ features
    with pytest.raises(np.linalg.LinAlgError):
        single = features.astype(np.float32)
        np.linalg.cholesky((single.T @ single).astype(np.float64))
    for width in (1, 4, 11):
        a, b = refit_outputs.factor(gram, weight, width)
        tail = np.linalg.svd(features @ weight, compute_uv=False)[width:]
        error = ((features @ (weight - a @ b)) ** 2).sum()
        np.testing.assert_allclose(error, (tail**2).sum(), rtol=1e-3)


@pytest.mark.parametrize("difference", [1e-2, 1e-4, 1e-6])
def test_outputs_of_inputs_that_hardly_differ(problem, difference):
    block, own, latent, _, _ = problem
    rng = np.random.default_rng(1)
    inputs = rng.standard_normal(D) + difference * rng.standard_normal((S, T, D))
    inputs = jnp.asarray(inputs, jnp.float32)
    target = attention_output(block, own, None, inputs)
    fitted = refit_outputs.refit_outputs(block, own, latent, inputs, target, ONES, v_head_dim=3)
    equations = Rows.of(groups(block, own, latent, inputs, target), EYES, D)
    features, wanted = equations.features, equations.target

    def error(layer):
        heads = HeadMaps(np.swapaxes(layer.v_up, 0, 1), layer.out, layer.out_bias)
        return ((features @ heads.weight - wanted) ** 2).mean() / (wanted**2).mean()

    assert error(fitted) < 2e-2 * error(latent)


def test_query_positions_end_positionsthe_last():
    np.testing.assert_array_equal(refit_queries.query_positions(10, 3), [3, 6, 9])
    np.testing.assert_array_equal(refit_queries.query_positions(4, 100), np.arange(4))
    assert refit_queries.query_positions(4, 100).dtype == np.int32


def test_a_layer_without_rope_or_softcap_refits_too(problem):
    block, own, latent, original, converted = problem
    base = dataclasses.replace(GQA, rope=None, window=None, softcap=None)
    block = dataclasses.replace(block, layer=LayerConfig(base, MLPConfig(16)))
    bare = dataclasses.replace(
        latent, key_rope=latent.key_rope[:, :0], query_rope=latent.query_rope[..., :0], rope=None
    )
    fitted = refit_queries.refit_queries(block, own, bare, original, converted)
    assert fitted.query_rope.shape == (2, 8, 0) and np.isfinite(fitted.k_up).all()


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("width", [3, L])
def test_rows_and_normal_equations_have_the_same_solution(problem, monkeypatch, biased, width):
    block, own, latent, original, converted = problem
    target = original[:1] - converted[:1]
    args = (block, own, latent, converted[:1, :10], target[:, :10], ONES[:1, :10])
    few = refit_outputs.refit_outputs(*args, v_head_dim=width, biased=biased)
    monkeypatch.setattr(refit_outputs, "Rows", Normal)
    many = refit_outputs.refit_outputs(*args, v_head_dim=width, biased=biased)
    product = [np.einsum("lnv,nvd->nld", fitted.v_up, fitted.out) for fitted in (few, many)]
    np.testing.assert_allclose(*product, atol=1e-3 * np.abs(product[1]).max())
    np.testing.assert_allclose(few.out_bias, many.out_bias, atol=1e-3)
