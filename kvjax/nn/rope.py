"""Rotary position embedding: the frequencies of every scaling rule, and the rotation."""

import dataclasses
import functools
import math
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
    RopeConfig,
    SelectedPairs,
    YarnScaling,
)


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
    def of(cls, rope: RopeConfig | None) -> "Turn":
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
