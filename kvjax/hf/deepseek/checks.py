"""Checks of an export: of the model before anything is written, of the directory afterwards."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.checkpoint_files import INDEX, SINGLE, Checkpoint, scan
from kvjax.config import (
    DecoupledConfig,
    EqualCacheConfig,
    GQAConfig,
    LayerConfig,
    MLAConfig,
    MLPConfig,
    ModelConfig,
)
from kvjax.fields import Text, refuse, violations
from kvjax.hf.deepseek.config import shared_rope
from kvjax.hf.fields import EVERY, OWN
from kvjax.hf.load import load_tokenizer
from kvjax.paths import local_path
from kvjax.text_files import read_object

NORMS = ("neutral", "rms")
CONVERT = "convert it with kvjax.transmla.convert(method='decoupled', mode='fold')"


def problems(
    config: ModelConfig, params: Mapping[str, Any], norm: str, latent_rms: Sequence[Any] | None
) -> list[str]:
    """The reasons why this model cannot be exported with this norm; empty if it can."""
    found = [*_model_problems(config), *_layer_problems(config)]
    if found:
        return found  # the checks below assume MLA layers of one size
    check = _neutral_problems if norm == "neutral" else _rms_problems
    return [*_rope_problems(config, norm), *check(config, params, latent_rms)]


def latent_configs(config: ModelConfig) -> list[MLAConfig]:
    """The attention of all MLA layers."""
    return [layer.attention for layer in config.layers if isinstance(layer.attention, MLAConfig)]


def _model_problems(c: ModelConfig) -> Iterator[str]:
    if c.post_norm or not c.pre_norm:
        yield "norms on the outputs of its sub-layers"
    if c.final_softcap is not None:
        yield f"a soft-cap of {c.final_softcap:g} on the logits"
    if len({layer.mlp for layer in c.layers}) > 1:
        yield "different MLPs in different layers"
    sizes = {_sizes(layer) for layer in c.layers}
    if len(sizes) > 1:
        yield f"layers of {len(sizes)} different sizes (rank, head widths, biases)"


def _sizes(layer: LayerConfig) -> Any:
    c = layer.attention
    if not isinstance(c, MLAConfig):
        return None
    # Rotary keys of different widths share one, and other checks look at windows and soft-caps.
    return dataclasses.replace(
        c, rope=None, qk_rope_head_dim=0, scale=1.0, window=None, softcap=None
    )


def _layer_problems(config: ModelConfig) -> list[str]:
    """Each reason, with the numbers of its layers."""
    layers: dict[str, list[int]] = defaultdict(list)
    # Most reasons hold for many layers: one line for each reason keeps the error short.
    for index, layer in enumerate(config.layers):
        for reason in (*_attention_problems(layer.attention, config), *_mlp_problems(layer)):
            layers[reason].append(index)
    return [f"{reason} (layers {', '.join(map(str, at))})" for reason, at in layers.items()]


def _mlp_problems(layer: LayerConfig) -> Iterator[str]:
    if not isinstance(layer.mlp, MLPConfig):
        yield "a mixture of experts"
    elif layer.mlp.bias:
        yield "biases in the MLP"


@functools.singledispatch
def _attention_problems(attention, config: ModelConfig) -> Iterator[str]:
    """Reasons of one layer."""
    yield f"attention of the kind {type(attention).__name__}"


@_attention_problems.register
def _(attention: GQAConfig, config: ModelConfig) -> Iterator[str]:
    yield f"grouped-query attention: {CONVERT}"


@_attention_problems.register
def _(attention: EqualCacheConfig, config: ModelConfig) -> Iterator[str]:
    yield f"latents of method 'equal_cache': {CONVERT}"


@_attention_problems.register
def _(attention: DecoupledConfig, config: ModelConfig) -> Iterator[str]:
    if attention.base.qk_norm is not None:
        yield "norms on queries and keys"
    else:
        yield f"latents of mode 'post': {CONVERT}"


@_attention_problems.register
def _(attention: MLAConfig, config: ModelConfig) -> Iterator[str]:
    if attention.latent_norm is not None:
        yield "latents that are normed already: use layout='hf'"
    if attention.softcap is not None:
        yield f"a soft-cap of {attention.softcap:g} on the attention"
    if attention.window is not None and attention.window < config.max_position_embeddings:
        yield (
            f"a sliding window of {attention.window} tokens in a context of "
            f"{config.max_position_embeddings}"
        )
    if attention.rope is None:
        yield "no rotary key"


def _rope_problems(config: ModelConfig, norm: str) -> Iterator[str]:
    ropes = [c.rope for c in latent_configs(config) if c.rope is not None]
    try:
        rope = shared_rope(ropes, config.max_position_embeddings)
    except ValueError as error:
        yield str(error)
        return
    if norm == "rms" and rope.parameters["rope_type"] == "longrope":
        yield (
            "rotary frequencies that are not evenly spaced or of another rule than default, linear "
            "and llama3: convert with exportable=True, or use norm='neutral'"
        )


def _neutral_problems(
    config: ModelConfig, params: Mapping[str, Any], latent_rms: Sequence[Any] | None
) -> Iterator[str]:
    if latent_rms is not None:
        yield "latent_rms, which only norm='rms' reads"
    if params["embedding"].dtype == np.float16:
        yield "float16, which cannot hold the large constant of norm='neutral': use bfloat16"


def _rms_problems(
    config: ModelConfig, params: Mapping[str, Any], latent_rms: Sequence[Any] | None
) -> Iterator[str]:
    if latent_rms is None:
        yield "no latent_rms=kvjax.hf.latent_rms(model, params, batches), which norm='rms' needs"
    else:
        got = [np.shape(weight) for weight in latent_rms]
        want = [(c.kv_lora_rank,) for c in latent_configs(config)]
        if got != want:
            yield f"latent_rms of shapes {got}, expected {want}"
    for name in ("q_bias", "q_a_bias", "kv_a_bias", "o_bias"):
        at = [i for i in range(config.num_layers) if _largest(params, i, name) > 0]
        if at:
            yield (
                f"{name} is not zero (layers {', '.join(map(str, at))}), and norm='rms' has no "
                "biases: convert a model without QKV biases by a recipe that makes none "
                "(kvjax.transmla.UNBIASED), or use norm='neutral'"
            )


def _largest(params: Mapping[str, Any], layer: int, name: str) -> float:
    bias = params[f"layers_{layer}"]["attn"].get(name)
    return 0.0 if bias is None else float(np.max(np.abs(np.asarray(bias, np.float64))))


GENERATION = "generation_config.json"
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
PROBE = "Hello  world!\n\tThe 3 naïve cafés: x = {1, 2};  你好 🙂 <s> </s> <|im_end|>"


def check_export(path: str | Path, source: str | Path | None = None) -> dict[str, Any]:
    """Checks a directory that `kvjax.save(layout="deepseek_v3")` wrote. No tensor is read.

    Names, shapes and dtypes are compared with what transformers' class expects of this
    config.json, the index with the files, the special tokens of config.json,
    generation_config.json and tokenizer with each other.

    Args:
        path: the exported directory.
        source: directory of the model that was exported; its tokenizer must give the same ids.

    Returns:
        "tensors", "files", "bytes": counts of the weights. "tokenizer": the name of its class.
        "eos": ids that end a text. "notes": facts that are allowed but unusual.

    Raises:
        ValueError: one error lists everything that is wrong.
    """
    directory = local_path(path, "the export")
    raw = _read(directory / "config.json")
    if raw.get("architectures") != ["DeepseekV3ForCausalLM"]:
        raise ValueError(
            f"{directory} holds {raw.get('architectures')}, expected ['DeepseekV3ForCausalLM']"
        )
    kinds = {"dtype": Text, **EVERY, **OWN}
    refuse((line for _, line in violations(raw, kinds)), str(directory / "config.json"))
    # Weights: names, shapes and dtypes, and the index against the files.
    found, expected = scan(directory), stock_tensors(raw)
    problems = [
        *found.problems,
        *_file_problems(directory, found),
        *_tensor_problems(found, expected, raw.get("dtype")),
    ]
    # Special tokens: engines read them from three files, which must agree.
    eos = _ids(_read(directory / GENERATION).get("eos_token_id"))
    if eos != _ids(raw.get("eos_token_id")):
        problems.append(f"{GENERATION} ends texts with {eos}, config.json with another")
    notes: list[str] = [] if eos else ["no token ends a text"]
    name = None
    if any((directory / file).is_file() for file in TOKENIZER):
        tokenizer = load_tokenizer(directory)
        name = type(tokenizer).__name__
        problems += _tokenizer_problems(tokenizer, raw, source)
        if tokenizer.eos_token_id not in eos:
            notes.append(f"the tokenizer's EOS is {tokenizer.eos_token_id}, the model's {eos}")
    else:
        notes.append("no tokenizer")
    refuse(problems, f"{directory} is not whole")
    return {
        "tensors": len(found.tensors),
        "files": len({tensor.path for tensor in found.tensors.values()}),
        "bytes": sum(tensor.nbytes for tensor in found.tensors.values()),
        "tokenizer": name,
        "eos": eos,
        "notes": notes,
    }


def _tensor_problems(found: Checkpoint, expected: dict, dtype: str | None) -> Iterator[str]:
    stored = found.tensors
    for name, shape in expected.items():
        if name in found.lost:
            continue
        if name not in stored:
            yield f"missing {name}"
        elif stored[name].shape != shape:
            yield f"{name} has shape {stored[name].shape}, expected {shape}"
        elif stored[name].dtype.name != dtype:
            yield f"{name} is {stored[name].dtype.name}, config.json says {dtype}"
    yield from (f"unexpected {name}" for name in sorted(stored.keys() - expected.keys()))


def _file_problems(directory: Path, found: Checkpoint) -> Iterator[str]:
    """Differences between index and files: some engines read all files, others follow the index."""
    files = {path.name for path in directory.glob("*.safetensors")}
    if SINGLE in files or not (directory / INDEX).is_file():
        yield from (f"{name} belongs to no index" for name in sorted(files - {SINGLE}))
        if (directory / INDEX).exists():
            yield f"there are {SINGLE} and an index, expected one of them"
        return
    index = _read(directory / INDEX)
    named = {name: file for name, file in index["weight_map"].items() if isinstance(file, str)}
    yield from (f"{name} belongs to no index" for name in sorted(files - set(named.values())))
    unmapped = found.tensors.keys() - named.keys()
    yield from (f"the index does not name {name}" for name in sorted(unmapped))
    total = sum(tensor.nbytes for tensor in found.tensors.values())
    about = index.get("metadata")
    said = about.get("total_size") if isinstance(about, dict) else None
    if not found.problems and said != total:
        yield f"the index says {said} bytes, the files hold {total}"


def _tokenizer_problems(tokenizer: Any, raw: dict, source: str | Path | None) -> Iterator[str]:
    if len(tokenizer) > raw["vocab_size"]:
        yield f"the tokenizer has {len(tokenizer)} tokens, the model {raw['vocab_size']}"
    # Without that file, transformers must guess the class of the tokenizer.
    if source is None or not (local_path(source, "source") / "tokenizer_config.json").is_file():
        return
    was, now = (t(PROBE)["input_ids"] for t in (load_tokenizer(source), tokenizer))
    if was != now:
        yield f"the tokenizer reads {now} where that of {source} reads {was}"


def _read(path: Path) -> dict[str, Any]:
    return read_object(path)


def _ids(value: Any) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)


Shape = tuple[int, ...]


def stock_tensors(raw: Mapping[str, Any]) -> dict[str, Shape]:
    """Name and shape of every tensor that transformers' DeepseekV3ForCausalLM expects.

    Follows the constructor of the class, not our writer, so that one can check the other. All MLPs
    must be dense.

    Args:
        raw: config.json of type deepseek_v3.

    Raises:
        ValueError: the model has experts, or a key is missing.
    """
    try:
        layers = raw["num_hidden_layers"]
        if raw["first_k_dense_replace"] < layers:
            raise ValueError(
                f"first_k_dense_replace is {raw['first_k_dense_replace']}, expected {layers}: "
                "all MLPs are dense"
            )
        D, V = raw["hidden_size"], raw["vocab_size"]
        one = {**_attention(raw), **_mlp(raw)}
    except KeyError as error:
        raise ValueError(f"config.json has no {error.args[0]}") from None
    top = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    return top | {f"model.layers.{i}.{name}": one[name] for i in range(layers) for name in one}


def _attention(raw: Mapping[str, Any]) -> dict[str, Shape]:
    D, N, L = raw["hidden_size"], raw["num_attention_heads"], raw["kv_lora_rank"]
    nope, rope, v = raw["qk_nope_head_dim"], raw["qk_rope_head_dim"], raw["v_head_dim"]
    M, queries = raw["q_lora_rank"], N * (nope + rope)
    weights = {
        "kv_a_proj_with_mqa.weight": (L + rope, D),
        "kv_a_layernorm.weight": (L,),
        "kv_b_proj.weight": (N * (nope + v), L),
        "o_proj.weight": (D, N * v),
    }
    biases = {"kv_a_proj_with_mqa.bias": (L + rope,), "o_proj.bias": (D,)}
    if M is None:
        weights["q_proj.weight"] = (queries, D)
    else:
        weights["q_a_proj.weight"] = (M, D)
        weights["q_a_layernorm.weight"] = (M,)
        weights["q_b_proj.weight"] = (queries, M)
        biases["q_a_proj.bias"] = (M,)
    both = weights | (biases if raw["attention_bias"] else {})
    return {f"self_attn.{name}": shape for name, shape in both.items()}


def _mlp(raw: Mapping[str, Any]) -> dict[str, Shape]:
    D, F = raw["hidden_size"], raw["intermediate_size"]
    return {
        "mlp.gate_proj.weight": (F, D),
        "mlp.up_proj.weight": (F, D),
        "mlp.down_proj.weight": (D, F),
        "input_layernorm.weight": (D,),
        "post_attention_layernorm.weight": (D,),
    }
