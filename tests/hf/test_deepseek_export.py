"""Converted models in stock transformers' DeepseekV3ForCausalLM: the same logits and text."""

import dataclasses
import functools
import json
import tempfile
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from toys import random_params

import kvjax
from kvjax.config import (
    DecoupledConfig,
    DynamicScaling,
    EqualCacheConfig,
    GQAConfig,
    LinearScaling,
    MLPConfig,
    MoEConfig,
    NormConfig,
    RopeConfig,
    SelectedPairs,
)
from kvjax.hf import latent_rms
from kvjax.hf.deepseek.config import shared_rope
from kvjax.hf.deepseek.export import calibrated, neutral, to_deepseek
from kvjax.nn import Transformer

pytest.importorskip("torch")
from tiny_checkpoints import CASES, LLAMA3, YARN, build, torch_greedy, torch_logits

pytestmark = pytest.mark.parity

T = 24
TOKENS = np.random.default_rng(5).integers(3, 67, (1, T)).astype(np.int32)
CALIBRATION = np.random.default_rng(6).integers(3, 67, (8, 32)).astype(np.int32)
FAST = dataclasses.replace(kvjax.transmla.BEST, refit=False)
SIZES = {"kv_rank": 20, "rope_dim": 4}

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 6.0],
    "original_max_position_embeddings": 16,
}

# name → checkpoint, options of the conversion
MODELS = {
    "llama3": (CASES["llama"], {"exportable": True}),
    "mistral": ({"model_type": "mistral", "sliding_window": None}, {"exportable": True}),
    "qwen2": ({"model_type": "qwen2"}, {"exportable": True}),
    "free_yarn": ({"model_type": "llama", "rope_parameters": YARN}, {}),
    "longrope": ({"model_type": "llama", "rope_parameters": LONGROPE}, {"exportable": True}),
    "unbiased": ({"model_type": "llama"}, {"exportable": True, "recipe": kvjax.transmla.UNBIASED}),
}
NEUTRAL = [name for name in MODELS if name != "unbiased"]


@functools.cache
def converted(name):
    case, options = MODELS[name]
    directory = Path(tempfile.mkdtemp(prefix=f"kvjax-export-{name}-"))
    build(case, directory)
    model, params = kvjax.load(directory, dtype="float32")
    stats = kvjax.transmla.calibrate(model, params, [CALIBRATION])
    return kvjax.transmla.convert(
        model, params, method="decoupled", stats=stats, **{"recipe": FAST, **SIZES, **options}
    )


@functools.cache
def exported(name, norm="neutral"):
    """Directory of the exported model and the stock model that reads it."""
    model, params = converted(name)
    directory = Path(tempfile.mkdtemp(prefix=f"kvjax-export-{name}-")) / norm
    options = {"latent_rms": latent_rms(model, params, [CALIBRATION])} if norm == "rms" else {}
    kvjax.save(model, params, directory, layout="deepseek_v3", norm=norm, **options)
    return directory, stock(directory)


def stock(directory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM

        model, info = AutoModelForCausalLM.from_pretrained(
            directory, attn_implementation="eager", output_loading_info=True
        )
    assert type(model) is DeepseekV3ForCausalLM
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@functools.cache
def program(name):
    model, params = converted(name)
    apply = jax.jit(model.apply)
    return lambda tokens: np.asarray(apply({"params": params}, tokens)[0])


def relative(got, want):
    return np.abs(got - want).max() / np.abs(want).max()


# --- The same function in the stock class ---------------------------------------------------------


@pytest.mark.parametrize("name", NEUTRAL)
def test_stock_logits_equal_ours(name):
    want = program(name)(TOKENS)
    assert np.abs(want).max() > 0.3
    assert relative(torch_logits(exported(name)[1], TOKENS), want) < 1e-5


@pytest.mark.parametrize("name", [name for name in NEUTRAL if name != "longrope"])
def test_greedy_text_of_the_stock_class_is_ours(name):
    """Each of its tokens is the most likely one by our logits, the whole text in view."""
    prompt = TOKENS[0, : T // 2].tolist()
    text = prompt + torch_greedy(exported(name)[1], prompt, T // 2)
    ours = program(name)(np.asarray([text], np.int32))[0].argmax(-1)
    assert text[T // 2 :] == ours[T // 2 - 1 : -1].tolist()


@pytest.mark.parametrize("name", ["longrope", "free_yarn"])
def test_listed_frequencies_on_both_sides_of_the_original_length(name):
    """16 tokens for longrope, whose frequencies change there, and 64, the context, for yarn."""
    directory, torch_model = exported(name)
    settings = json.loads((directory / "config.json").read_text())["rope_parameters"]
    original = settings["original_max_position_embeddings"]
    assert (settings["rope_type"], original) == (
        "longrope",
        {"longrope": 16, "free_yarn": 64}[name],
    )
    assert (settings["short_factor"] != settings["long_factor"]) == (name == "longrope")
    tokens = np.random.default_rng(7).integers(3, 67, (1, original + 8)).astype(np.int32)
    for length in (original, original + 8):
        want = program(name)(tokens[:, :length])
        assert relative(torch_logits(torch_model, tokens[:, :length]), want) < 1e-5


@pytest.mark.parametrize("name", ["qwen2", "free_yarn"])
def test_load_reads_what_was_exported(name):
    directory, _ = exported(name)
    model, params = kvjax.load(directory, dtype="float32")
    source, _ = converted(name)
    assert model.config.eos_ids == source.config.eos_ids == (2,)
    assert (model.config.bos_id, model.config.context_length) == (1, 64)
    got = np.asarray(jax.jit(model.apply)({"params": params}, TOKENS)[0])
    assert relative(got, program(name)(TOKENS)) < 1e-5


def test_what_folds_into_the_weights(tmp_path):
    """Low-rank queries with two biases, 1 + w norms, scaled embeddings, gelu, a wide window."""
    source, params = converted("qwen2")
    rng = np.random.default_rng(8)
    c, new = source.config, dict(params)
    layers = []
    for i, layer in enumerate(c.layers):
        attn = dict(params[f"layers_{i}"]["attn"])
        shape = (6, *attn["q"].shape[1:])
        attn["q_a"] = rng.normal(size=(c.hidden_size, 6)).astype(np.float32)
        attn["q_a_bias"] = rng.normal(size=6).astype(np.float32)
        attn["q"] = rng.normal(size=shape).astype(np.float32) / 3
        new[f"layers_{i}"] = {**params[f"layers_{i}"], "attn": attn}
        attention = dataclasses.replace(layer.attention, q_lora_rank=6, window=64, scale=0.2)
        mlp = dataclasses.replace(layer.mlp, activation="gelu_tanh")
        layers.append(dataclasses.replace(layer, attention=attention, mlp=mlp))
    config = dataclasses.replace(
        c,
        layers=tuple(layers),
        norm=NormConfig(1e-5, offset=0.5),
        embedding_scale=3.0,
        eos_ids=(2, 5),
    )
    model = Transformer(config)
    kvjax.save(model, new, tmp_path / "out", layout="deepseek_v3")
    want = np.asarray(jax.jit(model.apply)({"params": new}, TOKENS)[0])
    assert relative(torch_logits(stock(tmp_path / "out"), TOKENS), want) < 1e-5
    assert kvjax.hf.read_model(tmp_path / "out").config.eos_ids == (2, 5)


def test_config_json():
    raw = {n: json.loads((exported(n)[0] / "config.json").read_text()) for n in ("qwen2", "llama3")}
    expected = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "kv_lora_rank": 21,  # the constant takes one
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 2,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "rope_interleave": True,
        "num_nextn_predict_layers": 0,
        "dtype": "float32",
    }
    for config in raw.values():
        assert {key: config[key] for key in expected} == expected
    assert raw["qwen2"]["kvjax_requires"] == ["attention_bias"]
    assert raw["llama3"]["kvjax_requires"] == ["attention_bias", "rope_parameters"]
    assert (raw["qwen2"]["q_lora_rank"], raw["llama3"]["q_lora_rank"]) == (33, None)
    assert raw["llama3"]["rope_parameters"] == LLAMA3
    assert raw["qwen2"]["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}


# --- The norm -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0, 3, 6])
def test_the_error_of_a_neutral_norm_falls_with_the_square_of_its_constant(bits):
    """1 − 1/√(1 + ‖c‖²/B²), and B is at least `margin` times the largest ‖c‖."""
    rng = np.random.default_rng(0)
    down, bias, weight = rng.normal(size=(32, 6)), rng.normal(size=6), 1 + 0.1 * rng.normal(size=32)
    n = neutral(down, bias, weight, margin=2.0**bits)
    x = rng.normal(size=(100, 32))
    x *= weight / np.sqrt((x**2).mean(1, keepdims=True))
    z, c = x @ n.down + n.bias, x @ down + bias
    got = z * n.weight / np.sqrt((z**2).mean(1, keepdims=True)) @ n.up
    ratio = (c**2).sum(1) / n.bias[0] ** 2
    want = 1 - 1 / np.sqrt(1 + ratio)
    np.testing.assert_allclose(1 - got / c, np.broadcast_to(want[:, None], c.shape), atol=1e-12)
    assert want.max() < 0.5 / 4.0**bits
    assert np.log2(n.bias[0]).is_integer() and n.weight[1] == n.bias[0]


def test_latent_rms_changes_the_latents_least():
    model, params = converted("unbiased")
    own = params["layers_0"]
    x = np.asarray(params["embedding"], np.float64)[CALIBRATION.reshape(-1)]
    x /= np.sqrt((x**2).mean(1, keepdims=True) + model.config.norm.eps)
    c = x * np.asarray(own["attn_pre_norm"]) @ np.asarray(own["attn"]["kv_a"])[:, :20]
    unit = c / np.sqrt((c**2).mean(1, keepdims=True))
    want = (c * unit).sum(0) / (unit**2).sum(0)  # least squares, one dimension at a time
    first, second = latent_rms(model, params, [CALIBRATION[:4], CALIBRATION[4:]])
    np.testing.assert_allclose(first, want, rtol=1e-4)
    assert second.shape == (20,) and not np.allclose(first, second, rtol=1e-2)
    n = calibrated(np.eye(20), np.zeros(20), want)
    z = c @ n.down
    got = z * n.weight / np.sqrt((z**2).mean(1, keepdims=True)) @ n.up
    np.testing.assert_allclose(got, unit * want, rtol=1e-9)


def test_rms_export_has_no_bias_and_is_close():
    directory, torch_model = exported("unbiased", "rms")
    raw = json.loads((directory / "config.json").read_text())
    assert (raw["attention_bias"], raw["kv_lora_rank"], raw["q_lora_rank"]) == (False, 20, None)
    assert "kvjax_requires" not in raw
    assert not [n for n in kvjax.hf.stored_tensors(directory) if n.endswith(".bias")]
    want = program("unbiased")(TOKENS)
    got = torch_logits(torch_model, TOKENS)
    assert 1e-3 < relative(got, want) < 0.5
    model, params = kvjax.load(directory, dtype="float32")
    assert relative(np.asarray(jax.jit(model.apply)({"params": params}, TOKENS)[0]), got) < 1e-5


# --- Rotary keys ----------------------------------------------------------------------------------


def test_layers_share_the_union_of_their_frequencies():
    base = RopeConfig(8, theta=100.0)
    ropes = [RopeConfig(2 * len(p), scaling=SelectedPairs(base, p)) for p in ((3, 0, 0), (1, 0))]
    shared = shared_rope(ropes, context=64)
    assert shared.dim == 8  # pairs 0, 0, 1, 3
    assert shared.columns == ((6, 0, 2, 7, 1, 3), (4, 0, 5, 1))
    assert shared.spread(np.arange(1.0, 5.0), 1).tolist() == [2, 4, 0, 0, 1, 3, 0, 0]
    divisors = 100.0 ** (np.array([0, 0, 1, 3]) / 4)
    np.testing.assert_allclose(shared.parameters["short_factor"], divisors, rtol=1e-6)


# --- Refusals -------------------------------------------------------------------------------------


def everywhere(config, **attention):
    return config.with_attention(
        tuple(dataclasses.replace(layer.attention, **attention) for layer in config.layers)
    )


def with_layers(config, **changes):
    layers = tuple(dataclasses.replace(layer, **changes) for layer in config.layers)
    return dataclasses.replace(config, layers=layers)


def turned(config, scaling):
    rope = RopeConfig(4, scaling=SelectedPairs(RopeConfig(8, scaling=scaling), (0, 2)))
    return everywhere(config, rope=rope)


GQA = GQAConfig(4, 2, 8, 8**-0.5, RopeConfig(8))

REFUSED = {
    r"a soft-cap of 5 on the attention \(layers 0, 1\)": lambda c: everywhere(c, softcap=5.0),
    "a sliding window of 63 tokens in a context of 64": lambda c: everywhere(c, window=63),
    "no rotary key": lambda c: everywhere(c, rope=None),
    "latents that are normed already: use layout='hf'": lambda c: everywhere(
        c, latent_norm=NormConfig()
    ),
    "grouped-query attention: convert it with": lambda c: c.with_attention((GQA,) * 2),
    "latents of method 'equal_cache': convert": lambda c: c.with_attention(
        (EqualCacheConfig(GQA, 1, 8, 8),) * 2
    ),
    "norms on queries and keys": lambda c: c.with_attention(
        (DecoupledConfig(dataclasses.replace(GQA, qk_norm="head"), 20, GQA.rope, 8),) * 2
    ),
    "latents of mode 'post'": lambda c: c.with_attention(
        (DecoupledConfig(GQA, 20, GQA.rope, 8),) * 2
    ),
    "a mixture of experts": lambda c: with_layers(c, mlp=MoEConfig(4, 2, 8)),
    "biases in the MLP": lambda c: with_layers(c, mlp=MLPConfig(48, bias=True)),
    "norms on the outputs": lambda c: dataclasses.replace(c, post_norm=True),
    "a soft-cap of 30 on the logits": lambda c: dataclasses.replace(c, final_softcap=30.0),
    "layers of 2 different sizes": lambda c: c.with_attention(
        (c.layers[0].attention, dataclasses.replace(c.layers[1].attention, kv_lora_rank=19))
    ),
    "dynamic NTK RoPE": lambda c: turned(c, DynamicScaling(2.0, 64)),
    "the layers have 2 different RoPEs": lambda c: c.with_attention(
        (c.layers[0].attention, turned(c, LinearScaling(2.0)).layers[1].attention)
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals(reason, tmp_path):
    model, _ = converted("unbiased")
    refused = Transformer(REFUSED[reason](model.config))
    with pytest.raises(ValueError, match=f"layout cannot express this model: .*{reason}"):
        kvjax.save(refused, random_params(refused), tmp_path / "out", layout="deepseek_v3")
    assert not (tmp_path / "out").exists()


def test_one_error_lists_every_reason():
    model, params = converted("unbiased")
    config = dataclasses.replace(everywhere(model.config, softcap=5.0), post_norm=True)
    with pytest.raises(ValueError, match=r"norms on the outputs.*; a soft-cap of 5"):
        to_deepseek(Transformer(config), params)


def test_refusals_of_the_norms():
    model, params = converted("unbiased")
    weights = [np.ones(20)] * 2
    half = jax.tree.map(lambda x: x.astype(np.float16), params)
    cases = [
        ("norm is 'layer', expected one of neutral, rms", model, params, "layer", None),
        ("latent_rms, which only norm='rms' reads", model, params, "neutral", weights),
        ("float16, which cannot hold", model, half, "neutral", None),
        (r"no latent_rms=kvjax\.hf\.latent_rms", model, params, "rms", None),
        (r"latent_rms of shapes \[\(20,\)\], expected", model, params, "rms", weights[:1]),
        ("evenly spaced", *converted("free_yarn"), "rms", weights),
        (r"q_bias is not zero.*kv_a_bias is not zero", *converted("qwen2"), "rms", weights),
        (r"o_bias is not zero \(layers 0, 1\)", *converted("mistral"), "rms", weights),
    ]
    for reason, of, values, norm, rms in cases:
        with pytest.raises(ValueError, match=reason):
            to_deepseek(of, values, norm, rms)
