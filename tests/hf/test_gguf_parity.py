"""GGUF files against transformers' own reader, which needs torch and accelerate."""

import warnings

import numpy as np
import pytest

import kvjax

pytest.importorskip("torch")
from gguf_files import CASES, COMMON, hf_tensors, raw_config, write
from tiny_checkpoints import torch_logits

pytestmark = pytest.mark.parity

TOKENS = np.random.default_rng(5).integers(3, 96, (1, 24)).astype(np.int32)
WIDE = {**COMMON, "hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
GEMMA = {"head_dim": 256, "sliding_window": 7, "query_pre_attn_scalar": 256}
K_QUANTS = {"attn_q": "Q4_K", "attn_k": "Q6_K", "ffn_down": "Q5_K", "token_embd": "Q8_0"}
READ = {
    "llama": ({}, K_QUANTS),
    "qwen2": ({"model_type": "qwen2"}, {**K_QUANTS, "attn_v": "Q2_K", "ffn_up": "IQ4_XS"}),
    "qwen3": ({"model_type": "qwen3", "head_dim": 128}, {}),
    "gemma2": (
        {
            "model_type": "gemma2",
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            **GEMMA,
        },
        {"ffn_up": "Q3_K"},
    ),
    "gemma3_text": (
        {
            "model_type": "gemma3_text",
            "num_hidden_layers": 7,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            **GEMMA,
        },
        {"ffn_up": "Q5_0"},
    ),
    "phi3": ({"model_type": "phi3"}, {"attn_qkv": "Q4_1"}),
}
"""Families that transformers reads right → config, quantization of tensors. (It has no smollm3 and
olmo2, and no experts of llama; and it leaves out RoPE scaling, soft-caps and the query scalar.)"""


def wide_config(name):
    kind = {"hidden_activation": "gelu_pytorch_tanh"} if "gemma" in name else {"hidden_act": "silu"}
    return {**WIDE, **kind, **READ[name][0]}


def random_tensors(raw, seed=0):
    """Weights of unit gain, norms near 1 (near 0 where the model adds 1) and small biases."""
    rng, found = np.random.default_rng(seed), {}
    for name, values in hf_tensors(raw).items():
        noise = rng.normal(size=values.shape).astype(np.float32)
        one = 1.0 if "norm" in name and "gemma" not in raw["model_type"] else 0.0
        wide = values.ndim > 1
        found[name] = noise / values.shape[-1] ** 0.5 if wide else np.float32(one + 0.1 * noise)
    return found


def written(path, name):
    raw, kinds = wide_config(name), READ[name][1]

    def kind(tensor):
        return kinds.get(tensor.split(".")[-2], "F32")

    write(path, raw, random_tensors(raw), kind)


def by_transformers(path):
    pytest.importorskip("accelerate")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        settings = {"gguf_file": path.name, "attn_implementation": "eager", "dtype": "float32"}
        return AutoModelForCausalLM.from_pretrained(path.parent, **settings).eval()


@pytest.mark.parametrize("name", READ)
def test_logits_equal_transformers(tmp_path, name):
    written(tmp_path / "model.gguf", name)
    model, params = kvjax.load(tmp_path, dtype="float32")
    got = np.asarray(model.apply({"params": params}, TOKENS)[0])
    want = torch_logits(by_transformers(tmp_path / "model.gguf"), TOKENS)
    assert np.abs(want).max() > 0.3
    np.testing.assert_allclose(got, want, atol=2e-4 * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_transformers_computes_what_is_saved(tmp_path, name):
    """config.json made of the metadata says to transformers what it says to kvjax.

    So files are compared with transformers' models where its reader of GGUF does not know the
    architecture, or leaves out RoPE scaling, soft-caps and scales.
    """
    from transformers import AutoModelForCausalLM

    raw = raw_config(name)
    write(tmp_path / "model.gguf", raw, random_tensors(raw))
    model, params = kvjax.load(tmp_path, dtype="float32")
    kvjax.save(model, params, tmp_path / "hf", layout="hf")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = {"attn_implementation": "eager"}
        torch_model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", **settings).eval()
    got = np.asarray(model.apply({"params": params}, TOKENS)[0])
    np.testing.assert_allclose(got, torch_logits(torch_model, TOKENS), atol=1e-4, rtol=0)
