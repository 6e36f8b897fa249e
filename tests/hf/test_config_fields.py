"""Values of config.json and kvjax.json that mean nothing: one error of one line."""

import json
import math
import re
import shutil

import pytest
from toys import random_params

import kvjax
from kvjax.config import MLPConfig, YarnScaling
from kvjax.hf import read_model, read_shape
from kvjax.hf.config import config_from_hf, read_config
from kvjax.hf.families import FAMILIES
from kvjax.hf.native import encode, part_problems
from kvjax.hf.source import BUILTIN_DIRECTORY
from kvjax.nn import Transformer

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
OTHERS = {
    "deepseek_v3": {"first_k_dense_replace": 2},
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
}


def error_of(changes):
    """The error that a config with changes gives: one line for each problem."""
    with pytest.raises(ValueError) as error:
        config_from_hf({**LLAMA, **changes})
    return str(error.value)


COUNT = "a whole number from 1 to 2147483647"
FLAG = "true or false"
REAL = "a finite number above 0"
EPS = "a finite number from 0 to 1"


@pytest.mark.parametrize(
    ("family", "key", "value", "expected"),
    [
        ("llama", "vocab_size", 10**15, COUNT),
        ("llama", "hidden_size", 32.0, COUNT),
        ("llama", "hidden_size", True, COUNT),
        ("llama", "num_attention_heads", 0, COUNT),
        ("llama", "num_attention_heads", 1.5, COUNT),
        ("llama", "num_key_value_heads", 0, COUNT),
        ("llama", "num_hidden_layers", 0, "a whole number from 1 to 10000"),
        ("llama", "num_hidden_layers", 10**15, "a whole number from 1 to 10000"),
        ("llama", "head_dim", "8", COUNT),
        ("llama", "max_position_embeddings", 0, COUNT),
        ("llama", "max_position_embeddings", "512", COUNT),
        ("llama", "max_position_embeddings", None, COUNT),
        ("llama", "tie_word_embeddings", "no", FLAG),
        ("llama", "tie_word_embeddings", None, FLAG),
        ("llama", "attention_bias", 1, FLAG),
        ("llama", "mlp_bias", "false", FLAG),
        ("llama", "rope_theta", -1, REAL),
        ("llama", "rope_theta", 0, REAL),
        ("llama", "rope_theta", math.nan, REAL),
        ("llama", "rope_theta", math.inf, REAL),
        ("llama", "rope_theta", 10**400, REAL),
        ("llama", "rope_theta", "1e4", REAL),
        ("llama", "rms_norm_eps", math.nan, EPS),
        ("llama", "rms_norm_eps", -1e-6, EPS),
        ("llama", "rms_norm_eps", "1e-6", EPS),
        ("llama", "rms_norm_eps", 10**15, EPS),
        ("llama", "rms_norm_eps", None, EPS),
        ("llama", "rope_scaling", "linear", "an object or null"),
        ("llama", "rope_parameters", [1], "an object or null"),
        ("llama", "quantization_config", "awq", "an object or null"),
        ("llama", "layer_types", "full_attention", "a list of texts or null"),
        ("llama", "hidden_act", ["silu"], "a text"),
        ("llama", "eos_token_id", "2", "a token id, a list of token ids or null"),
        ("llama", "eos_token_id", [2, "3"], "a token id, a list of token ids or null"),
        ("llama", "eos_token_id", 2.0, "a token id, a list of token ids or null"),
        ("llama", "bos_token_id", [1], "a whole number from -1 to 2147483647 or null"),
        ("llama", "transformers_weights", "other.safetensors", "no such key"),
        ("mistral", "sliding_window", 0, f"{COUNT} or null"),
        ("mistral", "sliding_window", -4096, f"{COUNT} or null"),
        ("qwen2", "use_sliding_window", "yes", FLAG),
        ("qwen2", "max_window_layers", None, "a whole number from 0 to 2147483647"),
        ("qwen3_moe", "num_experts", 0, f"{COUNT} or null"),
        ("qwen3_moe", "decoder_sparse_step", 0, COUNT),
        ("qwen3_moe", "mlp_only_layers", ["0"], "a list of layer numbers or null"),
        ("qwen3_moe", "mlp_only_layers", 3, "a list of layer numbers or null"),
        ("gemma2", "query_pre_attn_scalar", 0, REAL),
        ("gemma2", "attn_logit_softcapping", 0.0, REAL),
        ("gemma3_text", "sliding_window_pattern", 0, f"{COUNT} or null"),
        ("smollm3", "no_rope_layer_interval", 0, COUNT),
        ("smollm3", "no_rope_layers", [True, False], "a list of 0 and 1 or null"),
        ("phi3", "original_max_position_embeddings", 0, "a whole number from 2 to 2147483647"),
        ("phi3", "partial_rotary_factor", 1.5, "a finite number above 0 and of at most 1"),
        ("deepseek_v3", "q_lora_rank", 0, f"{COUNT} or null"),
        ("deepseek_v3", "v_head_dim", None, COUNT),
    ],
)
def test_a_value_of_the_wrong_kind(family, key, value, expected):
    message = error_of({"model_type": family, **OTHERS.get(family, {}), key: value})
    assert message.startswith(f"{key} is {value!r}"[:40])
    assert f"expected {expected}" in message
    assert message.count(" is ") == 1 and "\n" not in message


ROPES = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"factor": 4.0},
    "longrope": {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 4.0},
}


@pytest.mark.parametrize("style", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("kind", "key", "value", "message"),
    [
        ("linear", "factor", 0, "factor is 0, expected a finite number ab"),
        ("linear", "factor", "2", "factor is '2', expected a finite number ab"),
        (
            "linear",
            "factor",
            10**15,
            "factor is 1000000000000000, expected a finite number above 0",
        ),
        ("linear", "factor", True, "factor is True, expected a finite number ab"),
        ("dynamic", "factor", math.nan, "factor is nan, expected a finite number ab"),
        ("linear", "rope_theta", -5.0, "rope_theta is -5.0, expected a finite number ab"),
        ("llama3", "high_freq_factor", 1.0, "(1.0, 1.0), expected them to rise"),
        ("llama3", "original_max_position_embeddings", 0, "is 0, expected a whole number from 2"),
        ("yarn", "attention_factor", -1.0, "is -1.0, expected a finite number ab"),
        ("yarn", "beta_fast", "32", "beta_fast is '32', expected a finite number ab"),
        ("yarn", "truncate", "no", "truncate is 'no', expected true or false"),
        ("longrope", "short_factor", [1.0] * 3, "short_factor has 3 entries, expected 4, half of"),
        ("longrope", "long_factor", [1.0] * 5, "long_factor has 5 entries, expected 4, half of 8"),
        ("longrope", "long_factor", [1.0, 2.0, 0.0, 1.0], "expected a list of positive numbers"),
        ("longrope", "long_factor", 2.0, "is 2.0, expected a list of positive numbers"),
        ("linear", "rope_type", ["linear"], "rope_type is ['linear'], expected a text"),
        ("linear", "partial_rotary_factor", 0.5, "partial_rotary_factor is 0.5, expected 1 for"),
        ("linear", "full_attention", {}, "an entry for 'full_attention', expected one for all"),
    ],
)
def test_rope_numbers(style, kind, key, value, message):
    got = error_of({style: {"rope_type": kind, **ROPES[kind], key: value}})
    assert message in got


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"full_attention": 3}}, "rope_parameters.full_attention is 3, expec"),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 0}}},
            "rope_parameters.sliding_attention.factor is 0, expected a finite number above 0",
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 8.0}},
            "rope_parameters has no entry for 'full_attention' or 'sliding_attention'",
        ),
    ],
)
def test_rope_of_each_kind_of_layer(changes, message):
    assert message in error_of({"model_type": "gemma3_text", "head_dim": 8, **changes})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [0, 1, 3])
def test_layer_types_have_one_entry_a_layer(family, length):
    changes = {"model_type": family, **OTHERS.get(family, {})}
    message = error_of({**changes, "layer_types": ["full_attention"] * length})
    assert message == f"layer_types has {length} entries, expected 2, one per layer"


def test_lists_that_are_shorter_or_longer_than_the_model():
    smollm3 = {"model_type": "smollm3"}
    message = error_of({**smollm3, "no_rope_layers": [1]})
    assert message == "no_rope_layers has 1 entries, expected at least 2"
    longer = config_from_hf({**LLAMA, **smollm3, "no_rope_layers": [0, 1, 1, 0]})
    assert [layer.attention.rope is None for layer in longer.layers] == [True, False]
    message = error_of({"model_type": "qwen3_moe", "mlp_only_layers": [0, 2, 7]})
    assert message == "mlp_only_layers names [2, 7], expected numbers below 2"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 30}, "hidden_size is 30, expected a multiple of 4 heads where no head"),
        ({"head_dim": 7}, "RoPE would rotate 7 components of a head, expected an even number"),
        (
            {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3},
            "num_experts_per_tok is 3, expected at most the 2 experts",
        ),
        (
            {"model_type": "qwen3_moe", "num_experts_per_tok": 129},
            "num_experts_per_tok is 129, expected at most the 128 experts",
        ),
        (
            {"model_type": "phi3", "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope type is 'linear', expected longrope for phi3",
        ),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "expected a causal model"),
        ({"model_type": ["llama"]}, "model_type is ['llama'], expected one of deepseek_v3"),
    ],
)
def test_values_that_do_not_fit_each_other(changes, message):
    assert message in error_of(changes)


def test_one_error_lists_all_problems_of_the_files(tmp_path):
    raw = {**LLAMA, "rope_theta": -1, "tie_word_embeddings": "no", "layer_types": []}
    del raw["vocab_size"]
    raw["rope_scaling"] = {"rope_type": "linear", "factor": 0}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": ["</s>"]}')
    problems = [
        f"vocab_size is missing, expected {COUNT}",
        "tie_word_embeddings is 'no', expected true or false",
        "rope_theta is -1, expected a finite number above 0 or null",
        "layer_types has 0 entries, expected 2, one per layer",
        "rope_scaling.factor is 0, expected a finite number above 0 and of at most 1000000.0 "
        "or null",
    ]
    path, generation = tmp_path / "config.json", tmp_path / "generation_config.json"
    lines = [f"{path}: {line}" for line in problems]
    with pytest.raises(ValueError) as error:
        read_config(tmp_path)
    assert str(error.value).splitlines() == [
        *lines,
        f"{generation}: eos_token_id is ['</s>'], expected a token id, a list of token ids or null",
    ]
    with pytest.raises(ValueError) as error:
        read_shape(str(path))
    assert str(error.value).splitlines() == lines


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"rope_theta": 10_000}, lambda c: c.layers[0].attention.rope.theta == 1e4),
        ({"rope_theta": 1e6}, lambda c: c.layers[0].attention.rope.theta == 1e6),
        ({"rms_norm_eps": 0}, lambda c: c.norm.eps == 0.0),
        ({"eos_token_id": [2, 3]}, lambda c: c.eos_ids == (2, 3)),
        ({"eos_token_id": -1}, lambda c: c.eos_ids == (-1,)),
        ({"sliding_window": 0}, lambda c: c.layers[0].attention.window is None),
        ({"layer_types": None, "head_dim": None}, lambda c: c.layers[0].attention.head_dim == 8),
        (
            {"hidden_activation": "gelu_pytorch_tanh"},
            lambda c: c.layers[0].mlp.activation == "silu",
        ),
        ({"model_type": "qwen2", "sliding_window": 0}, lambda c: c.num_layers == 2),
        (
            {"original_max_position_embeddings": 16, "rope_scaling": {"type": "yarn", "factor": 4}},
            lambda c: c.layers[0].attention.rope.scaling.original_length == 64,
        ),
        (
            {"model_type": "deepseek_v3", "first_k_dense_replace": 2, "rope_interleave": None},
            lambda c: not c.layers[0].attention.rope.interleaved,
        ),
    ],
)
def test_values_that_transformers_reads_are_read_likewise(changes, check):
    assert check(config_from_hf({**LLAMA, **changes}))


def test_the_context_length_that_a_file_leaves_out():
    """It is 2048 for Llama, and what YaRN starts from."""
    raw = {key: value for key, value in LLAMA.items() if key != "max_position_embeddings"}
    config = config_from_hf({**raw, "rope_scaling": {"type": "yarn", "factor": 4.0}})
    assert config.max_position_embeddings == 2048
    assert config.layers[0].attention.rope.scaling.original_length == 2048


# --- Files that hold no such object ----------------------------------------------------------

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 16060617592\n"


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "kvjax.json"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (POINTER, "{name} is a git-lfs pointer, not the file itself: run `git lfs pull`"),
        ("[1]", "{name} holds a list, expected an object"),
        ("\udcff", "{name} is not UTF-8 text: "),
        ("[" * 100_000, "{name} is not JSON: "),
    ],
)
def test_files_that_hold_no_object(tmp_path, name, text, message):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=re.escape(message.format(name=name))) as error:
        read_model(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "tokenizer.model"])
def test_a_tokenizer_that_is_a_pointer(tmp_path, name):
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(ValueError, match=rf"{name} is a git-lfs pointer, .* run `git lfs pull`"):
        kvjax.load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", "[", r"tokenizer\.json is not JSON: "),
        ("tokenizer.json", "{}", "cannot read the tokenizer of "),
        ("tokenizer_config.json", "[1]", r"tokenizer_config\.json holds a list, expected"),
        ("special_tokens_map.json", "[", r"special_tokens_map\.json is not JSON: "),
        ("config.json", "[1]", r"config\.json holds a list, expected an object"),
        ("tokenizer.json", None, "cannot read the tokenizer of "),
    ],
)
def test_a_damaged_tokenizer_is_one_line(tmp_path, name, text, message):
    path = tmp_path / "model"
    shutil.copytree(BUILTIN_DIRECTORY / "needle", path)
    (path / name).unlink(missing_ok=True)
    if text is not None:
        (path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        kvjax.load_tokenizer(path)
    assert "\n" not in str(error.value)


# --- kvjax.json ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("vocab_size",), "64", f"model.vocab_size is '64', expected {COUNT}"),
        (("vocab_size",), 0, f"model.vocab_size is 0, expected {COUNT}"),
        (("vocab_size",), 10**15, f"model.vocab_size is 1000000000000000, expected {COUNT}"),
        (("tie_embeddings",), "no", "model.tie_embeddings is 'no', expected true or false"),
        (("eos_ids",), 2, "model.eos_ids is 2, expected a list, each a whole number from -1"),
        (("eos_ids",), [2, "a"], "model.eos_ids[1] is 'a', expected a whole number from -1"),
        (("norm",), 1e-6, "model.norm is 1e-06, expected an object (NormConfig)"),
        (("norm", "eps"), math.nan, f"model.norm.eps is nan, expected {EPS}"),
        (("norm", "eps"), -1.0, f"model.norm.eps is -1.0, expected {EPS}"),
        (("norm", "bias"), 1, "model.norm has an unknown field 'bias'"),
        (("layers",), {}, "model.layers is an unknown part None, expected a list, each"),
        (("layers", 1, "attention", "num_heads"), 4.0, "layers[1].attention.num_heads is 4.0, exp"),
        (("layers", 1, "attention", "head_dim"), True, "layers[1].attention.head_dim is True, exp"),
        (("layers", 0, "attention", "rope", "theta"), 0, "layers[0].attention.rope.theta is 0, ex"),
        (("layers", 0, "attention", "qk_norm"), "x", "qk_norm is 'x', expected one of head, all"),
        (("layers", 0, "mlp", "activation"), "relu", "activation is 'relu', expected one of silu"),
        (
            ("layers", 0, "attention"),
            "GQA",
            "layers[0].attention is 'GQA', expected an object (GQAC",
        ),
    ],
)
def test_values_of_a_native_config(tmp_path, path, value, message):
    model = Transformer(config_from_hf(LLAMA))
    kvjax.save(model, random_params(model), tmp_path / "a")
    content = json.loads((tmp_path / "a" / "kvjax.json").read_text())
    place = content["model"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (tmp_path / "a" / "kvjax.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_model(tmp_path / "a")
    assert str(error.value).startswith(f"{tmp_path / 'a' / 'kvjax.json'}: model.")


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        (MLPConfig(8), {"activation": "relu"}, "activation is 'relu', expected one of silu, gelu"),
        (YarnScaling(4.0, 64, 1.0, 0.0, 1.0), {}, "beta_fast is 0.0, expected a finite number ab"),
        (YarnScaling(4.0, 64, 1.0, 32.0, -1.0), {}, "beta_slow is -1.0, expected a finite number"),
    ],
)
def test_parts_of_a_native_config(part, changes, message):
    (problem,) = part_problems(encode(part) | changes, type(part))
    assert message in problem
