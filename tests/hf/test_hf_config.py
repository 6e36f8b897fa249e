"""config.json → ModelConfig: real files, both RoPE styles, defaults, errors."""

import json

import pytest

from kvjax.config import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    MoEConfig,
    RopeConfig,
    YarnScaling,
)
from kvjax.hf.config import config_from_hf, read_config

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
SUPPORTED = (
    "deepseek_v3, gemma2, gemma3_text, llama, mistral, mixtral, olmo2, phi3, qwen2, qwen3, "
    "qwen3_moe, smollm3"
)


def attentions(raw):
    return [layer.attention for layer in config_from_hf(raw).layers]


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "L", "N", "K", "H", "theta"),
    [
        ("Qwen--Qwen3-0.6B", 28, 16, 8, 128, 1e6),
        ("Qwen--Qwen3-30B-A3B", 48, 32, 4, 128, 1e6),
        ("meta-llama--Meta-Llama-3.1-8B", 32, 32, 8, 128, 5e5),
        ("meta-llama--Meta-Llama-3.1-70B", 80, 64, 8, 128, 5e5),
        ("mistralai--Mixtral-8x7B-v0.1", 32, 32, 8, 128, 1e6),
    ],
)
def test_real_files(data_dir, name, L, N, K, H, theta):
    raw = json.loads((data_dir / "hf_configs" / f"{name}.json").read_text())
    config = config_from_hf(raw)
    assert config.num_layers == L
    for layer in config.layers:
        a = layer.attention
        assert (a.num_heads, a.num_kv_heads, a.head_dim, a.scale) == (N, K, H, H**-0.5)
        assert (a.rope.theta, a.rope.dim, a.window) == (theta, H, None)
        assert a.qk_norm == ("head" if "Qwen3" in name else None)
    assert config.eos_ids == (raw["eos_token_id"],)
    assert json.loads(config.hf_json) == raw


@pytest.mark.data
def test_real_files_with_features(data_dir):
    def real(name):
        return config_from_hf(json.loads((data_dir / "hf_configs" / f"{name}.json").read_text()))

    llama = real("meta-llama--Meta-Llama-3.1-8B")
    assert llama.layers[0].attention.rope.scaling == Llama3Scaling(8.0, 1.0, 4.0, 8192)
    assert real("Qwen--Qwen3-0.6B").tie_embeddings
    assert real("Qwen--Qwen3-30B-A3B").layers[7].mlp == MoEConfig(128, 8, 768, "silu", True)
    assert real("mistralai--Mixtral-8x7B-v0.1").layers[7].mlp == MoEConfig(8, 2, 14336)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("google--gemma-4-26B-A4B", f"model_type is 'gemma4', expected one of {SUPPORTED}"),
        (
            "meta-llama--Llama-4-Scout-17B-16E-Instruct",
            f"model_type is 'llama4', expected one of {SUPPORTED}",
        ),
        ("moonshotai--Kimi-K2-Instruct", f"model_type is 'kimi_k2', expected one of {SUPPORTED}"),
        ("openai--gpt-oss-20b", f"model_type is 'gpt_oss', expected one of {SUPPORTED}"),
        (
            "deepseek-ai--DeepSeek-V3",
            "deepseek_v3 with experts is not supported: first_k_dense_replace is 3, expected at "
            "least num_hidden_layers = 61",
        ),
    ],
)
def test_unsupported_real_files(data_dir, name, message):
    raw = json.loads((data_dir / "hf_configs" / f"{name}.json").read_text())
    with pytest.raises(ValueError) as error:
        config_from_hf(raw)
    assert str(error.value) == message


SCALINGS = {
    "default": ({}, None),
    "linear": ({"factor": 4}, LinearScaling(4.0)),
    "dynamic": ({"factor": 2.0}, DynamicScaling(2.0, 64)),
    "llama3": (
        {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        Llama3Scaling(8.0, 1.0, 4.0, 16),
    ),
    "yarn": (
        {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 20},
        YarnScaling(4.0, 16, 1.1386294361119891, 20.0, 1.0),
    ),
    "longrope": (
        {
            "short_factor": [1.0] * 4,
            "long_factor": [3.0] * 4,
            "original_max_position_embeddings": 16,
        },
        LongRopeScaling((1.0,) * 4, (3.0,) * 4, 16, 1.5**0.5),
    ),
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_rope_styles_agree(kind):
    numbers, scaling = SCALINGS[kind]
    styles = [
        {"rope_theta": 5e4, "rope_scaling": {"type": kind, **numbers}},
        {"rope_theta": 5e4, "rope_scaling": {"rope_type": kind, **numbers}},
        {"rope_parameters": {"rope_theta": 5e4, "rope_type": kind, **numbers}},
    ]
    for style in styles:
        for attention in attentions({**LLAMA, **style}):
            assert attention.rope == RopeConfig(8, 5e4, scaling)


def test_rope_defaults_and_partial_rotation():
    assert attentions(LLAMA)[0].rope == RopeConfig(8, 10_000.0)
    assert attentions({**LLAMA, "rope_scaling": None, "rope_theta": 1e6})[0].rope.theta == 1e6
    assert attentions({**LLAMA, "model_type": "smollm3"})[0].rope.theta == 2e6
    for style in (
        {"partial_rotary_factor": 0.5},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    ):
        assert attentions({**LLAMA, "model_type": "phi3", **style})[0].rope.dim == 4


def test_attention_factor():
    yarn = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}

    def factor(**settings):
        raw = {**LLAMA, "rope_scaling": {**yarn, **settings}}
        return attentions(raw)[0].rope.scaling.attention_factor

    assert factor() == pytest.approx(1.3688879)
    assert factor(attention_factor=1.25) == 1.25
    assert factor(mscale=1.0, mscale_all_dim=1.0) == 1.0
    assert factor(mscale=1.0, mscale_all_dim=0.5) == pytest.approx(1.3688879 / 1.1844440)


def test_early_phi3_names_longrope_otherwise():
    """Phi-3's first files say "su", and keep the original length beside the RoPE dict."""
    raw = {
        **LLAMA,
        "model_type": "phi3",
        "original_max_position_embeddings": 16,
        "rope_scaling": {"type": "su", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
    }
    want = LongRopeScaling((1.0,) * 4, (2.0,) * 4, 16, 1.5**0.5)
    assert attentions(raw)[0].rope.scaling == want


def test_gemma3_rope_per_layer_type():
    base = {**LLAMA, "model_type": "gemma3_text", "sliding_window": 5, "sliding_window_pattern": 3}
    old = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 2e4}
    new = {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        }
    }
    for style in (old, new):
        got = attentions({**base, **style})
        assert [a.window for a in got] == [5, 5, None]
        assert [a.rope for a in got] == [
            RopeConfig(256, 2e4),
            RopeConfig(256, 2e4),
            RopeConfig(256, 1e6, LinearScaling(8.0)),
        ]


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"model_type": "mistral"}, [4096] * 3),
        ({"model_type": "mistral", "sliding_window": None}, [None] * 3),
        ({"model_type": "qwen2"}, [None] * 3),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 2},
            [None, None, 4096],
        ),
        ({"model_type": "gemma2"}, [4096, None, 4096]),
        ({"model_type": "smollm3"}, [None] * 3),
        (
            {
                "model_type": "qwen3",
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                "sliding_window": 7,
            },
            [7, None, 7],
        ),
    ],
)
def test_windows(changes, windows):
    assert [a.window for a in attentions({**LLAMA, **changes})] == windows


def test_defaults_that_files_leave_out():
    """Saved configs omit what equals the class's default: Gemma ties its embeddings."""
    assert config_from_hf({**LLAMA, "model_type": "gemma2"}).tie_embeddings
    assert not config_from_hf(LLAMA).tie_embeddings
    assert attentions({**LLAMA, "model_type": "gemma2"})[0].head_dim == 256
    raw = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    assert attentions(raw)[0].num_kv_heads == 4


def test_eos_ids():
    assert config_from_hf(LLAMA).eos_ids == ()
    assert config_from_hf({**LLAMA, "eos_token_id": [3, 4]}).eos_ids == (3, 4)
    config = config_from_hf({**LLAMA, "eos_token_id": 3}, {"eos_token_id": [5, 6]})
    assert config.eos_ids == (5, 6)


def test_json_is_kept_verbatim(tmp_path):
    text = json.dumps(LLAMA, indent=7) + "\n\n"
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9}')
    config = read_config(tmp_path)
    assert (config.hf_json, config.eos_ids) == (text, (9,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, f"model_type is 'gpt2', expected one of {SUPPORTED}"),
        (
            {"hidden_size": None, "vocab_size": None},
            "vocab_size is missing, .*\nhidden_size is",
        ),
        ({"num_key_value_heads": 3}, "4 query heads for 3 KV heads, expected a multiple"),
        ({"hidden_act": "relu"}, "the activation is 'relu', expected one of silu"),
        ({"rope_scaling": {"type": "magic"}}, "rope type is 'magic', expected one of default"),
        ({"rope_scaling": {"type": "llama3", "factor": 2}}, "needs low_freq_factor, high_freq"),
        ({"quantization_config": {"quant_method": "fp8"}}, "is quantized .fp8., expected plain"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["linear"] * 3},
            "layer 0 has 'linear', expected 'full_attention' or 'sliding_attention'",
        ),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf({**LLAMA, **changes})


def test_unreadable_files(tmp_path):
    with pytest.raises(ValueError, match=r"no file at .*config"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list, expected an object"):
        read_config(tmp_path)
