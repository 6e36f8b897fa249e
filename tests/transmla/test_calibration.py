"""Calibration: moments against plain NumPy, streaming, resuming, and what it refuses."""

import dataclasses

import jax
import numpy as np
import pytest
from toys import random_params

from kvjax.config import GQAConfig, LayerConfig, MLAConfig, MLPConfig, ModelConfig, RopeConfig
from kvjax.nn import Transformer
from kvjax.sharding import param_shardings
from kvjax.transmla import Stats, calibrate

GQA = GQAConfig(4, 2, 8, 8**-0.5, RopeConfig(8), qkv_bias=True, qk_norm="head")
WINDOWED = dataclasses.replace(GQA, qk_norm=None, window=3, softcap=5.0)
V, T = 61, 16


@pytest.fixture(scope="module")
def toy():
    layers = tuple(LayerConfig(a, MLPConfig(24)) for a in (GQA, WINDOWED))
    model = Transformer(ModelConfig("llama", vocab_size=V, hidden_size=32, layers=layers))
    params = random_params(model)
    tokens = np.random.default_rng(0).integers(0, V, (6, T)).astype(np.int32)
    batches = [tokens[:2], tokens[2:4], tokens[4:]]
    return model, params, batches, calibrate(model, params, batches, input_moments=True)


def rms(x, weight, eps=1e-6):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def test_moments_of_the_first_layer(toy):
    _, params, batches, stats = toy
    tokens = np.concatenate(batches)
    np.testing.assert_array_equal(stats.tokens, tokens)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["layers_0"])
    y = rms(np.asarray(params["embedding"], np.float64)[tokens], p["attn_pre_norm"])
    q, k, v = (np.einsum("btd,dnh->btnh", y, p["attn"][n]) + p["attn"][f"{n}_bias"] for n in "qkv")
    q, k = rms(q, p["attn"]["q_norm"]), rms(k, p["attn"]["k_norm"])
    x = np.concatenate([k, v], axis=2).reshape(-1, 32)
    got = stats.layers[0]
    np.testing.assert_allclose(got.kv_mean, x.mean(0), atol=1e-5)
    np.testing.assert_allclose(got.kv_second, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    flat = q.reshape(-1, 4, 8)
    want = np.einsum("tnh,tng->nhg", flat, flat) / len(flat)
    np.testing.assert_allclose(got.q_second, want, rtol=1e-4, atol=1e-5)
    inputs = y.reshape(-1, 32)
    np.testing.assert_allclose(got.input_second, inputs.T @ inputs / len(inputs), atol=1e-5)

    def turned(x):
        angles = np.arange(T)[:, None] * 10_000.0 ** (-np.arange(4) / 4)
        z = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)[None, :, None]
        return np.concatenate([z.real, z.imag], axis=-1)

    s = np.einsum("bqnh,bsnh->bnqs", turned(q), np.repeat(turned(k), 2, axis=2)) * 8**-0.5
    weights = np.where(np.tri(T, dtype=bool), np.exp(s - s.max(-1, keepdims=True)), 0)
    weights = weights / weights.sum(-1, keepdims=True)
    share = weights.mean((1, 2)).reshape(-1) / len(tokens)
    np.testing.assert_allclose(got.attended_mean, share @ x, atol=1e-5)
    want = (share[:, None] * x).T @ x
    np.testing.assert_allclose(got.attended_second, want, rtol=1e-4, atol=1e-5)
    weights = weights.mean((0, 1))
    distance = [weights.diagonal(-d).sum() / T for d in range(T)]
    np.testing.assert_allclose(got.distance, distance, atol=1e-5)


def test_a_large_bias_of_the_keys_does_not_hide_their_differences(toy):
    model, params, batches, stats = toy
    attn = params["layers_1"]["attn"]
    biased = {**attn, "k_bias": 1000.0 + 0 * attn["k"][0]}
    config = dataclasses.replace(WINDOWED, qkv_bias=True)
    layers = (model.config.layers[0], LayerConfig(config, MLPConfig(24)))
    zeros = {f"{n}_bias": 0 * attn[n][0] for n in "qv"}
    new = {**params, "layers_1": {**params["layers_1"], "attn": biased | zeros}}
    model = Transformer(dataclasses.replace(model.config, layers=layers))
    got = calibrate(model, new, batches).layers[1]
    covariances = [
        x.kv_second[:16, :16] - np.outer(x.kv_mean[:16], x.kv_mean[:16])
        for x in (got, stats.layers[1])
    ]
    np.testing.assert_allclose(*covariances, rtol=2e-3, atol=2e-4)


def test_windows_bound_the_distance(toy):
    distance = toy[3].layers[1].distance
    assert (distance[:3] > 0).all() and not distance[3:].any()
    np.testing.assert_allclose([layer.distance.sum() for layer in toy[3].layers], 1, atol=1e-5)


def test_batches_do_not_matter(toy):
    model, params, batches, stats = toy
    whole = calibrate(model, params, [np.concatenate(batches)])
    for a, b in zip(whole.layers, stats.layers, strict=True):
        assert a.input_second is None
        for name in ("kv_mean", "kv_second", "attended_second", "q_second", "distance"):
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=2e-4, atol=1e-5)


def test_an_interrupted_run_goes_on(toy, tmp_path):
    model, params, batches, stats = toy
    path = tmp_path / "moments.npz"

    def interrupted():
        yield batches[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, params, interrupted(), input_moments=True, resume=path)
    resumed = calibrate(model, params, batches, input_moments=True, resume=path)
    for got in (resumed, Stats.load(path)):
        for a, b in zip(got.layers, stats.layers, strict=True):
            for field in dataclasses.fields(a):
                np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))
        np.testing.assert_array_equal(got.tokens, stats.tokens)
    with pytest.raises(ValueError, match="holds the moments of other batches"):
        calibrate(model, params, batches[::-1], resume=path)
    with pytest.raises(ValueError, match="holds the moments of 6 sequences, the batches have 4"):
        calibrate(model, params, batches[:2], resume=path)
    layer = params["layers_0"]
    other = params | {"layers_0": layer | {"attn": jax.tree.map(lambda x: -x, layer["attn"])}}
    with pytest.raises(ValueError, match=r"another model: got \w{12}, expected \w{12}"):
        calibrate(model, other, batches, resume=path)


def test_under_a_mesh(toy):
    model, params, batches, _ = toy
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("model",))
    params = jax.device_put(params, param_shardings(model, mesh))
    got = calibrate(model, params, batches[:1])
    want = calibrate(model, toy[1], batches[:1])
    for a, b in zip(got.layers, want.layers, strict=True):
        np.testing.assert_allclose(a.kv_second, b.kv_second, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(a.distance, b.distance, atol=1e-5)


def test_what_cannot_be_calibrated_on(toy, tmp_path):
    model, params, batches, _ = toy
    for bad, message in (
        ([], "got no batch"),
        ([batches[0], batches[1][:, :5]], "sequences of 5 tokens, expected 16 as in the first"),
        ([np.array([1, 2])], r"has shape \(2,\), expected ids \[B, T\]"),
        ([np.array([[1, V]])], "calibration has token 61, expected ids of 0 to 60"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(model, params, bad)
    mla = MLAConfig(4, 8, 4, 8, 12, None, 12**-0.5, RopeConfig(4))
    latent = Transformer(model.config.with_attention((mla, GQA)))
    with pytest.raises(ValueError, match="layer 0 has MLAConfig, expected GQAConfig"):
        calibrate(latent, random_params(latent), batches)
    (tmp_path / "no.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="holds no calibration"):
        Stats.load(tmp_path / "no.npz")
