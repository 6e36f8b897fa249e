"""Token scorers that see all queries of a prompt, not only the last ones."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.cache import AttentionSpec
from kvjax.checks import Range, check_ranges
from kvjax.config import (
    AttentionConfig,
    DynamicScaling,
    LongRopeScaling,
    RopeConfig,
)
from kvjax.nn.layers import rope
from kvjax.policies.scorers import LayerView, attention_weights, by_kv_head

QUERY_ROWS = 64  # queries whose attention over all keys is in memory at a time


@dataclass(frozen=True)
class ColumnSums:
    """H2O (arXiv 2306.14048): the sum of the attention that a token gets from all queries."""

    def observer(self, attention: AttentionConfig) -> SumAttention:
        """See `kvjax.policies.scorers.Scorer`."""
        return SumAttention()

    def __call__(self, view: LayerView) -> Float[Array, "B K S"]:
        return view.seen


@dataclass(frozen=True)
class SumAttention:
    """Adds up attention, [B, K, S] fp32; the mean over the query heads of a group."""

    def start(self, q_BTNH: jax.Array, keys_BKSX: jax.Array) -> Float[Array, "B K S"]:
        """See `kvjax.cache.dense.Observer`."""
        return jnp.zeros(keys_BKSX.shape[:3], jnp.float32)

    def watch(
        self,
        state: jax.Array,
        q_BTNH: jax.Array,
        positions_BT: jax.Array,
        keys_BKSX: jax.Array,
        lengths_B: jax.Array,
        spec: AttentionSpec,
    ) -> Float[Array, "B K S"]:
        """See `kvjax.cache.dense.Observer`."""
        T = q_BTNH.shape[1]
        # A few queries at a time: [T, S] weights of a long prompt would not fit.
        rows = min(QUERY_ROWS, T)
        tiles = -(-T // rows)
        pad = ((0, 0), (0, tiles * rows - T))
        q = jnp.pad(q_BTNH, (*pad, (0, 0), (0, 0)))
        positions = jnp.pad(positions_BT, pad, constant_values=-1)
        slots = jnp.arange(keys_BKSX.shape[2], dtype=jnp.int32)[None, None]
        held = jnp.where(slots < lengths_B[:, None, None], slots, -1)

        def add(tile: jax.Array, state: jax.Array) -> jax.Array:
            part = jax.lax.dynamic_slice_in_dim(q, tile * rows, rows, 1)
            at = jax.lax.dynamic_slice_in_dim(positions, tile * rows, rows, 1)
            weights = attention_weights(part, at, keys_BKSX, held, spec)
            return state + by_kv_head(jnp.sum(weights, axis=2), state.shape[1])

        return jax.lax.fori_loop(0, tiles, add, state)


MOST_FUTURE = 8192
"""Each of the next positions has a rotation matrix [H, H] in memory."""


@dataclass(frozen=True)
class ExpectedAttention:
    """Expected Attention (arXiv 2510.00636): the attention that future queries will pay to a token.

    Queries before rotation are assumed normal, q ~ N(μ, Σ), with the moments of the prompt's
    queries. μ' and Σ' are these moments under the mean rotation of the next `future` positions.
    score = softmax(k·μ'·scale + kᵀΣ'k·scale²/2) · ‖v‖, averaged over the query heads of a group.
    """

    future: int = 512

    def __post_init__(self):
        check_ranges(vars(self), {"future": Range(1, MOST_FUTURE, whole=True)})

    def observer(self, attention: AttentionConfig) -> QueryMoments:
        """See `kvjax.policies.scorers.Scorer`.

        Raises:
            NotImplementedError: RoPE whose frequencies depend on the length, or latent attention.
        """
        if attention.shared_latent:
            raise NotImplementedError("expected attention needs keys of heads, not latents")
        config = attention.unconverted
        if config.rope is not None and isinstance(
            config.rope.rule, DynamicScaling | LongRopeScaling
        ):
            raise NotImplementedError("expected attention needs RoPE of fixed frequencies")
        return QueryMoments(pure_rotation(config.rope), self.future)

    def __call__(self, view: LayerView) -> Float[Array, "B K S"]:
        moments: Moments = view.seen
        B, K, _, X = view.keys.shape
        mean, covariance = moments.rotated(view.lengths)
        N = mean.shape[1]
        keys, scale = view.keys.astype(jnp.float32), view.spec.scale
        mean = mean.reshape(B, K, N // K, X)
        covariance = covariance.reshape(B, K, N // K, X, X)
        # For normal q, log E[exp(q·k)] is the mean plus half the variance of q·k.
        logits = jnp.einsum("bksx,bkgx->bkgs", keys, mean) * scale
        logits += jnp.einsum("bksx,bkgxy,bksy->bkgs", keys, covariance, keys) * (scale**2 / 2)
        logits = jnp.where((view.positions >= 0)[:, :, None], logits, -jnp.inf)
        weights = jnp.mean(jax.nn.softmax(logits, axis=-1), axis=2)
        return weights * jnp.linalg.norm(view.values.astype(jnp.float32), axis=-1)


@flax.struct.dataclass
class Moments:
    """Sums over the queries before rotation.

    Attributes:
        count: [B] fp32, number of queries.
        first, second: [B, N, X] and [B, N, X, X] fp32, sums of q and of q·qᵀ.
        rope, future: settings of the observer, static.
    """

    count: Any
    first: Any
    second: Any
    rope: RopeConfig | None = flax.struct.field(pytree_node=False)
    future: int = flax.struct.field(pytree_node=False)

    def rotated(
        self, lengths: Int[Array, " B"]
    ) -> tuple[Float[Array, "B N X"], Float[Array, "B N X X"]]:
        """Mean and covariance, under the mean rotation of the positions after the prompt."""
        count = jnp.maximum(self.count, 1.0)[:, None, None]
        mean = self.first / count
        covariance = self.second / count[..., None] - mean[..., None] * mean[:, :, None]
        if self.rope is None:
            return mean, covariance
        turn = self._mean_rotation(lengths)
        mean = jnp.einsum("bxy,bny->bnx", turn, mean)
        return mean, jnp.einsum("bxy,bnyz,bwz->bnxw", turn, covariance, turn)

    def _mean_rotation(self, lengths: jax.Array) -> Float[Array, "B X X"]:
        """The mean of the RoPE matrices of the next `future` positions."""
        X = self.first.shape[-1]
        # RoPE is linear: the images of the unit vectors are the matrix.
        units = jnp.broadcast_to(jnp.eye(X, dtype=jnp.float32)[None, None], (1, self.future, X, X))
        steps = jnp.arange(self.future, dtype=jnp.int32)[None]
        ahead = jnp.mean(rope(units, steps, jnp.ones((1,), jnp.int32), self.rope), axis=1)
        # Rotations compose: first the mean of the steps ahead, then the rotation by the length.
        # Row y of `ahead` is the image of unit vector y.
        at = jnp.broadcast_to(ahead, (lengths.shape[0], X, X))[:, None]
        turned = rope(at, lengths[:, None], lengths, self.rope)[:, 0]
        return jnp.swapaxes(turned, 1, 2)


@dataclass(frozen=True)
class QueryMoments:
    """Undoes each query's rotation, and adds up first and second moments."""

    rope: RopeConfig | None
    future: int

    def start(self, q_BTNH: jax.Array, keys_BKSX: jax.Array) -> Moments:
        """See `kvjax.cache.dense.Observer`."""
        B, _, N, X = q_BTNH.shape
        count, first, second = (jnp.zeros(s, jnp.float32) for s in ((B,), (B, N, X), (B, N, X, X)))
        return Moments(count, first, second, self.rope, self.future)

    def watch(
        self,
        state: Moments,
        q_BTNH: jax.Array,
        positions_BT: jax.Array,
        keys_BKSX: jax.Array,
        lengths_B: jax.Array,
        spec: AttentionSpec,
    ) -> Moments:
        """See `kvjax.cache.dense.Observer`."""
        real = positions_BT >= 0
        q = jnp.where(real[:, :, None, None], q_BTNH.astype(jnp.float32), 0.0)
        q = unrotate(q, positions_BT, lengths_B, self.rope)
        return dataclasses.replace(
            state,
            count=state.count + jnp.sum(real, axis=1, dtype=jnp.float32),
            first=state.first + jnp.sum(q, axis=1),
            second=state.second + jnp.einsum("btnx,btny->bnxy", q, q),
        )


def unrotate(
    x_BTNH: Float[Array, "B T N H"],
    positions_BT: Int[Array, "B T"],
    lengths_B: Int[Array, " B"],
    config: RopeConfig | None,
) -> Float[Array, "B T N H"]:
    """The inverse of `rope`: rotates the mirrored vector and mirrors the result."""
    if config is None:
        return x_BTNH
    return mirror(rope(mirror(x_BTNH, config), positions_BT, lengths_B, config), config)


def mirror(x: jax.Array, config: RopeConfig) -> jax.Array:
    """The complex conjugate of the rotary pairs."""
    index = jnp.arange(x.shape[-1], dtype=jnp.int32)
    if config.interleaved:
        imaginary = (index % 2 == 1) & (index < config.dim)
    else:
        imaginary = (index >= config.dim // 2) & (index < config.dim)
    sign = jnp.where(imaginary, -1.0, 1.0).astype(x.dtype)
    return x * sign.reshape(*(1,) * (x.ndim - 1), -1)


def pure_rotation(config: RopeConfig | None) -> RopeConfig | None:
    """RoPE without its factor on cos and sin: queries and keys already contain this factor."""
    if config is None or not hasattr(config.scaling, "attention_factor"):
        return config
    scaling: Any = config.scaling
    return dataclasses.replace(config, scaling=dataclasses.replace(scaling, attention_factor=1.0))
