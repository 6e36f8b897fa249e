"""The parts of a block besides attention: products, norms, MLPs, and rotary positions (RoPE)."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.config import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    MLPConfig,
    MoEConfig,
    NormConfig,
    RopeConfig,
    SelectedPairs,
    YarnScaling,
)

Params = Mapping[str, Any]
"""The parameters of one part by name; kvjax.nn.params has the names and shapes."""

FEW = 16
"""Pad rows to pairs when there are at most this many: a device of a mesh may have a single one, and
the extra rows cost less than reading the weight."""


def matmul(
    x: Float[Array, "*rows In"], weight: Float[Array, "In ..."], dtype: Any = None
) -> Float[Array, ...]:
    """x · weight over the last axis of x and the first of the weight, accumulated in fp32.

    Args:
        dtype: dtype of the result; None for the dtype of x.

    Returns:
        [*rows, *out] for a weight of shape [In, *out].
    """
    dtype = x.dtype if dtype is None else dtype
    rows = x.size // x.shape[-1]
    # A few rows may be one per device of an accelerator mesh: pad them as well.
    if rows == 1:
        y = _two_of_each(x, weight)
    elif rows <= FEW:
        y = jax.lax.platform_dependent(x, weight, cpu=_product, default=_two_of_each)
    else:
        y = _product(x, weight)
    return y.astype(dtype)


def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    # With an fp32 result XLA:CPU multiplies bfloat16 directly. For a bfloat16 result it would
    # convert the whole weight to fp32 first, in every decode step.
    contract = (((x.ndim - 1,), (0,)), ((), ()))
    return jax.lax.dot_general(x, weight, contract, preferred_element_type=jnp.float32)


def _two_of_each(x: jax.Array, weight: jax.Array) -> jax.Array:
    """The product with a row of zeros after each row of x; no backend handles a single row well.

    XLA:CPU multiplies a single row outside its matrix library, on one core, with a weight converted
    to fp32. XLA:GPU writes the products to memory in fp32 before adding them up: five times the
    traffic of reading the weight. XLA:TPU uses the vector unit.
    """
    pairs = jnp.pad(x[..., None, :], ((0, 0),) * (x.ndim - 1) + ((0, 1), (0, 0)))
    return jax.lax.index_in_dim(_product(pairs, weight), 0, x.ndim - 1, keepdims=False)


def project(params: Params, name: str, x: Float[Array, "B T X"]) -> jax.Array:
    """x · W, plus the bias if there is one: the parameters `name` [X, ...] and `name`_bias."""
    y = matmul(x, params[name])
    bias = params.get(f"{name}_bias")
    return y if bias is None else y + bias[None, None]


def norm(
    params: Params, name: str, x: Float[Array, "B T D"], config: NormConfig | None
) -> Float[Array, "B T D"]:
    """RMS norm with the weight `name`; x is unchanged if the part has no such norm."""
    return x if config is None or name not in params else rms_norm(x, params[name], config)


def rms_norm(
    x: Float[Array, "*batch D"], weight: Float[Array, " D"], config: NormConfig
) -> Float[Array, "*batch D"]:
    """x / rms(x) · (offset + weight) over the last axis, in fp32, returned in x's dtype."""
    x32 = x.astype(jnp.float32)
    inv_rms = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + config.eps)
    scale = weight.astype(jnp.float32) + config.offset
    return (x32 * inv_rms * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def mlp(config: MLPConfig, params: Params, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """down(act(x · gate) · (x · up)), each product with a bias if the config says so."""
    gate, up = project(params, "gate", x_BTD), project(params, "up", x_BTD)
    return project(params, "down", ACTIVATIONS[config.activation](gate) * up)


def moe(config: MoEConfig, params: Params, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Each token through its `top_k` experts, weighted by the router's softmax.

    All experts process all tokens, and their outputs are weighted (zero for unchosen experts). The
    result is exact, shapes are static and no token is dropped. The arithmetic is
    num_experts / top_k times that of routed experts.
    """
    logits_BTE = matmul(x_BTD, params["router"])
    weight_BTE = routing_weights(logits_BTE, config).astype(x_BTD.dtype)
    activation = ACTIVATIONS[config.activation]

    # A scan over the experts keeps one expert's activations in memory.
    def add_expert(total, expert):
        gate_DF, up_DF, down_FD, weight_BT = expert
        hidden = activation(matmul(x_BTD, gate_DF)) * matmul(x_BTD, up_DF)
        return total + matmul(hidden, down_FD) * weight_BT[..., None], None

    matrices = params["gate"], params["up"], params["down"]
    experts = (*matrices, jnp.moveaxis(weight_BTE, -1, 0))
    return jax.lax.scan(add_expert, jnp.zeros_like(x_BTD), experts)[0]


def routing_weights(logits_BTE: Float[Array, "B T E"], config: MoEConfig) -> Float[Array, "B T E"]:
    """Softmax over the experts, zero outside each token's `top_k`; fp32."""
    probs = jax.nn.softmax(logits_BTE.astype(jnp.float32), axis=-1)
    top, chosen = jax.lax.top_k(probs, config.top_k)
    # Some models weigh the chosen experts to a sum of 1, others keep the softmax as it is.
    if config.normalize:
        top = top / jnp.sum(top, axis=-1, keepdims=True)
    one_hot = jax.nn.one_hot(chosen, config.num_experts, dtype=jnp.float32)
    return jnp.einsum("btk,btke->bte", top, one_hot)


@flax.struct.dataclass
class Turn:
    """A layer's RoPE as an argument of a program that several layers share.

    Attributes:
        pairs: [R/2] int32, the frequencies that a converted layer's rotary key has; None for other
            layers.
        bare: the RoPE without the pairs.
    """

    pairs: Any
    bare: RopeConfig | None = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, rope: RopeConfig | None) -> Turn:
        """Splits a layer's RoPE into pairs and the rest."""
        bare, pairs = without_pairs(rope)
        return cls(pairs, bare)

    @property
    def rope(self) -> RopeConfig | None:
        """The layer's RoPE, with its pairs."""
        return self.bare if self.pairs is None else with_pairs(self.bare, self.pairs)


def without_pairs(
    rope: RopeConfig | None,
) -> tuple[RopeConfig | None, Int[np.ndarray, " half"] | None]:
    """The RoPE without its selected pairs, and the pairs; None if it selects none."""
    if rope is None or not isinstance(rope.scaling, SelectedPairs):
        return rope, None
    bare = dataclasses.replace(rope, scaling=SelectedPairs(rope.scaling.of, ()))
    return bare, np.asarray(rope.scaling.pairs, np.int32)


@dataclass(frozen=True)
class SharedPairs(SelectedPairs):
    """Pairs as an array: an argument of a program that layers share, not a constant of it."""

    pairs: Any


def with_pairs(
    rope: RopeConfig | None, pairs: Int[Array, " half"] | Int[np.ndarray, " half"]
) -> RopeConfig:
    """The RoPE of one layer, for use inside a program that layers share."""
    assert rope is not None and isinstance(rope.scaling, SelectedPairs)
    return dataclasses.replace(rope, scaling=SharedPairs(rope.scaling.of, pairs))


def base_frequencies(config: RopeConfig) -> np.ndarray:
    """theta^(-2i/R) for i < R/2, fp32 [R/2]."""
    exponent = np.arange(0, config.dim, 2, dtype=np.float32) / np.float32(config.dim)
    return (1.0 / config.theta**exponent).astype(np.float32)


def frequencies(
    config: RopeConfig, lengths: Int[Array, " B"]
) -> tuple[Float[Array, "rows half"], float]:
    """Inverse frequencies, and the factor on cos and sin.

    Args:
        lengths: [B] total length of each sequence: prompt plus tokens to generate. Only rules that
            depend on the length (dynamic, longrope) read it.

    Returns:
        [1, R/2], or [B, R/2] if the rule depends on the length; and the attention factor.
    """
    return _scaled(config.scaling, config, lengths)


@functools.singledispatch
def _scaled(scaling: object, config: RopeConfig, lengths: jax.Array) -> tuple[jax.Array, float]:
    raise TypeError(f"no RoPE rule for {scaling!r}")


@_scaled.register(type(None))
def _(scaling, config, lengths):
    return jnp.asarray(base_frequencies(config))[None], 1.0


@_scaled.register
def _(scaling: LinearScaling, config, lengths):
    return jnp.asarray(base_frequencies(config) / np.float32(scaling.factor))[None], 1.0


@_scaled.register
def _(scaling: DynamicScaling, config, lengths):
    # Up to the original length growth is 1; beyond it the base grows with the length.
    length = jnp.maximum(lengths, scaling.original_length).astype(jnp.float32)
    growth = scaling.factor * length / scaling.original_length - (scaling.factor - 1)
    theta = config.theta * growth ** (config.dim / (config.dim - 2))
    exponent = jnp.arange(0, config.dim, 2, dtype=jnp.float32) / config.dim
    return 1.0 / theta[:, None] ** exponent[None], 1.0


@_scaled.register
def _(scaling: Llama3Scaling, config, lengths):
    inv_freq = base_frequencies(config)
    # Turns of each frequency within the original context: few turns mean a low frequency.
    turns = scaling.original_length * inv_freq / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    scaled = keep * inv_freq + (1 - keep) * inv_freq / scaling.factor
    return jnp.asarray(scaled.astype(np.float32))[None], 1.0


@_scaled.register
def _(scaling: YarnScaling, config, lengths):
    inv_freq = base_frequencies(config)

    def component_turning(turns: float) -> float:
        """Index of the component that makes `turns` turns within the original context."""
        wavelengths = scaling.original_length / (turns * 2 * math.pi)
        return config.dim * math.log(wavelengths) / (2 * math.log(config.theta))

    low, high = component_turning(scaling.beta_fast), component_turning(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.dim - 1)
    # Components below `low` keep their frequency, above `high` it is divided by the factor.
    ramp = (np.arange(config.dim // 2) - low) / max(high - low, 1e-3)
    interpolate = np.clip(ramp, 0.0, 1.0)
    scaled = interpolate * inv_freq / scaling.factor + (1 - interpolate) * inv_freq
    return jnp.asarray(scaled.astype(np.float32))[None], scaling.attention_factor


@_scaled.register
def _(scaling: LongRopeScaling, config, lengths):
    inv_freq = base_frequencies(config)
    short = jnp.asarray(inv_freq / np.asarray(scaling.short_factor, np.float32))
    long = jnp.asarray(inv_freq / np.asarray(scaling.long_factor, np.float32))
    is_long = (lengths > scaling.original_length)[:, None]
    return jnp.where(is_long, long[None], short[None]), scaling.attention_factor


@_scaled.register
def _(scaling: SelectedPairs, config, lengths):
    inv_freq, attention_factor = frequencies(scaling.of, lengths)
    return inv_freq[:, jnp.asarray(scaling.pairs, jnp.int32)], attention_factor


def rope(
    x_BTNH: Float[Array, "B T N H"],
    positions_BT: Int[Array, "B T"],
    lengths_B: Int[Array, " B"],
    config: RopeConfig | None,
) -> Float[Array, "B T N H"]:
    """Rotates the first `config.dim` components of every head by its position (RoFormer, eq. 34).

    Args:
        positions_BT: absolute positions; −1 (padding) is treated as 0.
        lengths_B: total sequence lengths, see `frequencies`.
        config: None returns x unchanged.
    """
    if config is None:
        return x_BTNH
    cos, sin = _cos_sin(positions_BT, lengths_B, config)
    turned, kept = jnp.split(x_BTNH, [config.dim], axis=-1)
    turned = _rotate(turned.astype(jnp.float32), cos, sin, config.interleaved)
    return jnp.concatenate([turned.astype(x_BTNH.dtype), kept], axis=-1)


def _cos_sin(
    positions_BT: Int[Array, "B T"], lengths_B: Int[Array, " B"], config: RopeConfig
) -> tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]:
    """Cosine and sine of every angle, times the attention factor."""

    def compute() -> tuple[jax.Array, jax.Array]:
        inv_freq, attention_factor = frequencies(config, lengths_B)
        positions = jnp.maximum(positions_BT, 0).astype(jnp.float32)
        angles = positions[:, :, None, None] * inv_freq[:, None, None, :]
        return jnp.cos(angles) * attention_factor, jnp.sin(angles) * attention_factor

    def compute_once() -> tuple[jax.Array, jax.Array]:
        # XLA:CPU would compute sine and cosine again for every head, which costs more than the
        # softmax of attention. The conditional prevents this: XLA does not fuse across it.
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute))
        return jax.lax.cond(jnp.any(positions_BT >= 0), compute, lambda: nothing)

    if positions_BT.shape[1] == 1:
        return compute()
    return jax.lax.platform_dependent(cpu=compute_once, default=compute)


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool) -> jax.Array:
    """Complex multiplication of the pairs of x by cos + i·sin."""
    axis = -1 if interleaved else -2
    pairs = x.reshape(*x.shape[:-1], *((-1, 2) if interleaved else (2, x.shape[-1] // 2)))
    a, b = jnp.take(pairs, 0, axis=axis), jnp.take(pairs, 1, axis=axis)
    return jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=axis).reshape(x.shape)
