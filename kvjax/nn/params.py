"""The parameters of each part of a model: names, shapes, logical axes and initial values.

Each function returns the table of one part, and `param_table` joins the tables to the parameters of
a whole model. So the shapes and shardings of a model are known without running or tracing the
model. `kvjax.nn.Transformer` declares its parameters from the same tables.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kvjax.config import (
    DecoupledConfig,
    EqualCacheConfig,
    GQAConfig,
    LayerConfig,
    MLAConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
)

Axes = tuple[str | None, ...]


@dataclass(frozen=True)
class Param:
    """One parameter.

    Attributes:
        shape, axes: one logical axis name per dimension; `kvjax.mesh.LOGICAL` maps them to a mesh.
        init: (key, shape, dtype) → initial values.
    """

    shape: tuple[int, ...]
    axes: Axes
    init: nn.initializers.Initializer


Table = dict[str, Param]
"""The parameters of one module, in the order in which Linen draws their random values: another
order would give other values for the same key."""


def declare(module: nn.Module, table: Table) -> dict[str, jax.Array]:
    """Declares the parameters of a running Linen module, in fp32, and returns their values."""
    return {
        name: module.param(name, param.init, param.shape, jnp.float32)
        for name, param in table.items()
    }


class Declared(nn.Module):
    """A Linen module that only declares parameters, and returns them as nested dicts.

    Attributes:
        table: {name: `Param` or a table of a module inside this one}.
    """

    table: Mapping[str, Any]

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        inside = {name: part for name, part in self.table.items() if isinstance(part, Mapping)}
        own = {name: param for name, param in self.table.items() if name not in inside}
        return declare(self, own) | {n: Declared(part, name=n)() for n, part in inside.items()}


def param_shapes(config: ModelConfig) -> Any:
    """The parameters of a model as a pytree of `jax.ShapeDtypeStruct`; nothing is computed."""
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), param_table(config))


def param_table(config: ModelConfig) -> dict[str, Any]:
    """The parameters of a model as a nested dict of `Param`."""
    layers = {f"layers_{i}": layer_params(config, layer) for i, layer in enumerate(config.layers)}
    return outside_layers(config) | layers


def outside_layers(config: ModelConfig) -> Table:
    """The embedding, the final norm, and the output matrix if it is not the embedding."""
    shape, axes = (config.vocab_size, config.hidden_size), ("vocab", "embed")
    table = {
        "embedding": Param(shape, axes, nn.initializers.normal(0.02)),
        "final_norm": _norm(config.hidden_size, config.norm),
    }
    if not config.tie_embeddings:
        table["lm_head"] = _weight(shape[::-1], axes[::-1])
    return table


def layer_params(config: ModelConfig, layer: LayerConfig) -> dict[str, Any]:
    """One layer: its norms, and the tables "attn" and "mlp"."""
    width = config.hidden_size
    present = {"pre": config.pre_norm, "post": config.post_norm}
    norms = {
        f"{part}_{place}_norm": _norm(width, config.norm)
        for part in ("attn", "mlp")
        for place in present
        if present[place]
    }
    attention, mlp = layer.attention, layer.mlp
    return {
        **norms,
        "attn": ATTENTION[type(attention)](attention, width),
        "mlp": MLPS[type(mlp)](mlp, width),
    }


# --- Attention: for inputs of `width` numbers ----------------------------------------------------


def gqa_params(config: GQAConfig, width: int) -> Table:
    """Projections q, k, v [D, heads, H] and o [N, H, D], with biases and norms as configured."""
    output = _output(config.num_heads, config.head_dim, width, config.out_bias)
    return _gqa_heads(config, width) | output


def _gqa_heads(config: GQAConfig, width: int) -> Table:
    H, bias = config.head_dim, config.qkv_bias
    return {
        **_projection("q", width, config.num_heads, H, "heads", bias),
        **_projection("k", width, config.num_kv_heads, H, "kv", bias),
        **_projection("v", width, config.num_kv_heads, H, "kv", bias),
        **_qk_norm("q_norm", config.num_heads, config),
        **_qk_norm("k_norm", config.num_kv_heads, config),
    }


def equal_cache_params(config: EqualCacheConfig, width: int) -> Table:
    """GQA's queries and output; down- and up-projections of the keys' and the values' latents."""
    c, base = config, config.base
    C, N, H, bias = c.latent_heads, base.num_heads, base.head_dim, base.qkv_bias
    axes = ("kv", "latent", "heads", "head_dim")
    return {
        **_projection("q", width, N, H, "heads", bias),
        **_qk_norm("q_norm", N, base),
        **_qk_norm("k_norm", rotated_heads(c), base),
        **_projection("k_down", width, C, c.key_rank, "kv", bias),
        **_projection("v_down", width, C, c.value_rank, "kv", bias),
        "k_up": _weight((C, c.key_rank, N // C, H), axes, in_axes=(1,)),
        "v_up": _weight((C, c.value_rank, N // C, H), axes, in_axes=(1,)),
        **_output(N, H, width, base.out_bias),
    }


def rotated_heads(config: EqualCacheConfig) -> int:
    """How many heads key norm and RoPE see: all query heads, or the latent as heads of H numbers.

    `rope_site` says whether they apply after or before the up-projection.
    """
    if config.rope_site == "after_up":
        return config.base.num_heads
    return config.latent_heads * config.key_rank // config.base.head_dim


def mla_params(config: MLAConfig, width: int) -> Table:
    """Queries, down-projection to the latent and the rotary key, up-projections, output."""
    c, N, L = config, config.num_heads, config.kv_lora_rank
    head_dim, R = c.qk_nope_head_dim + c.qk_rope_head_dim, c.qk_rope_head_dim
    axes = ("latent", "heads", "head_dim")
    low_rank_queries = {}
    if c.q_lora_rank is not None:
        low_rank_queries = {
            **_down_projection("q_a", width, c.q_lora_rank, c.latent_bias),
            **_latent_norm("q_norm", c.q_lora_rank, c.latent_norm),
        }
    return {
        **low_rank_queries,
        **_projection("q", c.q_lora_rank or width, N, head_dim, "heads", c.query_bias),
        **_down_projection("kv_a", width, L + R, c.latent_bias),
        **_latent_norm("kv_norm", L, c.latent_norm),
        "k_up": _weight((L, N, c.qk_nope_head_dim), axes),
        "v_up": _weight((L, N, c.v_head_dim), axes),
        **_output(N, c.v_head_dim, width, c.out_bias),
    }


def decoupled_params(config: DecoupledConfig, width: int) -> Table:
    """GQA's heads; the maps to the latent and the rotary key, and from the latent; the output."""
    c, base = config, config.base
    N, K, H, L, R = base.num_heads, base.num_kv_heads, base.head_dim, c.rank, c.rope_dim
    axes = ("latent", "heads", "head_dim")
    return {
        **_gqa_heads(base, width),
        "down": _weight((2 * K * H, L + R), (None, "latent")),
        "q_rope": _weight((N, H, R), ("heads", "head_dim", None), in_axes=(1,)),
        "k_up": _weight((L, N, H), axes),
        "v_up": _weight((L, N, c.v_head_dim), axes),
        **_output(N, c.v_head_dim, width, c.out_bias),
    }


def _projection(
    name: str, width: int, heads: int, head_dim: int, head_axis: str, bias: bool
) -> Table:
    """`name` [width, heads, head_dim] and `name`_bias [heads, head_dim]."""
    shape, axes = (width, heads, head_dim), ("embed", head_axis, "head_dim")
    return {name: _weight(shape, axes), **_bias(name, shape[1:], axes[1:], bias)}


def _down_projection(name: str, width: int, latent: int, bias: bool) -> Table:
    """`name` [width, latent] and `name`_bias [latent]."""
    weight = _weight((width, latent), ("embed", "latent"))
    return {name: weight, **_bias(name, (latent,), ("latent",), bias)}


def _output(heads: int, head_dim: int, width: int, bias: bool) -> Table:
    """o [heads, head_dim, width] and o_bias [width]."""
    shape, axes = (heads, head_dim, width), ("heads", "head_dim", "embed")
    return {"o": _weight(shape, axes, in_axes=(0, 1)), **_bias("o", (width,), ("embed",), bias)}


def _qk_norm(name: str, heads: int, config: GQAConfig) -> Table:
    """The weight of the norm on `heads` heads."""
    if config.qk_norm is None:
        return {}
    count = {"head": 1, "all": heads}[config.qk_norm]
    return {name: _norm(count * config.head_dim, config.norm)}


def _latent_norm(name: str, width: int, config: NormConfig | None) -> Table:
    return {} if config is None else {name: _norm(width, config)}


ATTENTION = {
    GQAConfig: gqa_params,
    EqualCacheConfig: equal_cache_params,
    MLAConfig: mla_params,
    DecoupledConfig: decoupled_params,
}

KV_NAMES = {
    GQAConfig: ("k", "v", "k_bias", "v_bias"),
    EqualCacheConfig: ("k_down", "k_up", "v_down", "v_up", "k_down_bias", "v_down_bias"),
    MLAConfig: ("kv_a", "kv_a_bias", "kv_norm", "k_up", "v_up"),
    DecoupledConfig: ("k", "v", "k_bias", "v_bias", "down", "k_up", "v_up"),
}
"""Parameters between a layer's input and its heads' keys and values, by kind of attention."""


# --- MLPs: for inputs of `width` numbers ---------------------------------------------------------


def mlp_params(config: MLPConfig, width: int) -> Table:
    """gate and up [D, F], down [F, D], each with a bias if the config says so."""
    F, into, out = config.width, ("embed", "mlp"), ("mlp", "embed")
    table = {}
    for name, shape, axes in (
        ("gate", (width, F), into),
        ("up", (width, F), into),
        ("down", (F, width), out),
    ):
        table |= {name: _weight(shape, axes), **_bias(name, shape[1:], axes[1:], config.bias)}
    return table


def moe_params(config: MoEConfig, width: int) -> Table:
    """router [D, E], and the stacked matrices of the E experts."""
    E, F = config.num_experts, config.width
    into, out = ("expert", "embed", "mlp"), ("expert", "mlp", "embed")
    return {
        "router": _weight((width, E), ("embed", "expert")),
        "gate": _weight((E, width, F), into, in_axes=(1,)),
        "up": _weight((E, width, F), into, in_axes=(1,)),
        "down": _weight((E, F, width), out, in_axes=(1,)),
    }


MLPS = {MLPConfig: mlp_params, MoEConfig: moe_params}


# --- Kinds of parameters -------------------------------------------------------------------------


def _weight(shape: tuple[int, ...], axes: Axes, in_axes: tuple[int, ...] = (0,)) -> Param:
    """A matrix; starts normal with variance 1 / fan-in, over the axes that a product sums over."""
    fan_in = math.prod(shape[axis] for axis in in_axes)
    return Param(shape, axes, nn.initializers.normal(fan_in**-0.5))


def _bias(name: str, shape: tuple[int, ...], axes: Axes, present: bool) -> Table:
    """`name`_bias, which starts at zero."""
    bias = Param(shape, axes, nn.initializers.zeros_init())
    return {f"{name}_bias": bias} if present else {}


def _norm(width: int, config: NormConfig) -> Param:
    """The weight of an RMS norm; starts at the identity."""
    return Param((width,), (None,), nn.initializers.constant(1.0 - config.offset))
