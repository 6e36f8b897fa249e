"""What transformers' DeepSeek class cannot express: every reason, before anything is written."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from kvjax.config import (
    DecoupledConfig,
    EqualCacheConfig,
    GQAConfig,
    LayerConfig,
    MLAConfig,
    MLPConfig,
    ModelConfig,
)
from kvjax.hf.deepseek.rope import shared_rope

NORMS = ("neutral", "rms")
CONVERT = "convert it with kvjax.transmla.convert(method='decoupled', mode='fold')"


def problems(
    config: ModelConfig, params: Mapping[str, Any], norm: str, latent_rms: Sequence[Any] | None
) -> list[str]:
    """Why this model cannot be written with this norm; empty if it can."""
    found = [*_model_problems(config), *_layer_problems(config)]
    if found:
        return found  # the rest reads the layers as what they are not
    check = _neutral_problems if norm == "neutral" else _rms_problems
    return [*_rope_problems(config, norm), *check(config, params, latent_rms)]


def latent_configs(config: ModelConfig) -> list[MLAConfig]:
    """The attention of all layers, where every one is MLA."""
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
    # Rotary keys of different widths share one; windows and caps are looked at by themselves.
    return dataclasses.replace(
        c, rope=None, qk_rope_head_dim=0, scale=1.0, window=None, softcap=None
    )


def _layer_problems(config: ModelConfig) -> list[str]:
    """Reasons with the layers that they hold for."""
    layers: dict[str, list[int]] = defaultdict(list)
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
