"""Multi-head latent attention with a decoupled rotary key (DeepSeek-V2, arXiv 2405.04434)."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.cache import AbsorbedCache, AttentionSpec, LatentCache, NoCache
from kvjax.config import MLAConfig, NormConfig
from kvjax.nn.gqa import norm_weight, output, projection
from kvjax.nn.matmul import matmul
from kvjax.nn.norm import rms_norm
from kvjax.nn.params import declare, zeros
from kvjax.nn.rope import rope


class MLA(nn.Module):
    """Expanded keys and values without a cache, absorbed projections with one.

    The cache holds L + R numbers a token for all heads: the normed latent c and the rotary key.
    """

    config: MLAConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        cache: AbsorbedCache | NoCache | None,
        lengths_B: Int[Array, " B"],
    ) -> tuple[Float[Array, "B T D"], AbsorbedCache | NoCache | None]:
        """Attention output and the cache with the new latents; see `Transformer.__call__`."""
        c = self.config
        N, L = c.num_heads, c.kv_lora_rank
        with jax.named_scope("qkv"):
            q_BTNH = self._queries(x_BTD)
            joint = down_project(self, "kv_a", x_BTD, L + c.qk_rope_head_dim, c.latent_bias)
            c_BTL, k_rope_BTR = jnp.split(joint, [L], axis=-1)
            c_BTL = latent_norm(self, "kv_norm", c_BTL, c.latent_norm)
            axes = ("latent", "heads", "head_dim")
            k_up_LNH = declare(self, "k_up", (L, N, c.qk_nope_head_dim), axes)
            v_up_LNH = declare(self, "v_up", (L, N, c.v_head_dim), axes)
        with jax.named_scope("rope"):
            q_nope_BTNH, q_rope_BTNR = jnp.split(q_BTNH, [c.qk_nope_head_dim], axis=-1)
            q_rope_BTNR = rope(q_rope_BTNR, positions_BT, lengths_B, c.rope)
            k_rope_BTR = rope(k_rope_BTR[:, :, None], positions_BT, lengths_B, c.rope)[:, :, 0]
        heads = LatentHeads(q_nope_BTNH, q_rope_BTNR, c_BTL, k_rope_BTR, k_up_LNH, v_up_LNH)
        out_BTNH, cache = heads.attend(
            positions_BT, cache, AttentionSpec(c.scale, c.window, c.softcap)
        )
        with jax.named_scope("out"):
            return output(self, out_BTNH, x_BTD.shape[-1], c.out_bias), cache

    def _queries(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T N H"]:
        """Queries of width nope + rope, through a low-rank latent where the config has one."""
        c = self.config
        head_dim = c.qk_nope_head_dim + c.qk_rope_head_dim
        if c.q_lora_rank is not None:
            x_BTD = down_project(self, "q_a", x_BTD, c.q_lora_rank, c.latent_bias)
            x_BTD = latent_norm(self, "q_norm", x_BTD, c.latent_norm)
        return projection(self, "q", x_BTD, c.num_heads, head_dim, "heads", c.query_bias)

    @staticmethod
    def init_cache(config: MLAConfig, batch_size: int, max_len: int, dtype) -> LatentCache:
        """An empty cache: L + R numbers a token."""
        return LatentCache.create(
            batch_size, max_len, config.kv_lora_rank, config.qk_rope_head_dim, dtype
        )


class LatentHeads(NamedTuple):
    """Queries, and what all heads share of the keys and values: the maths of latent attention.

    Attributes:
        q_nope, q_rope: [B, T, N, H] queries of the latent part, and [B, T, N, R] rotated ones.
        c, k_rope: [B, T, L] latents and [B, T, R] rotated keys.
        k_up, v_up: [L, N, H] and [L, N, V], latents to each head's keys and values.
    """

    q_nope: jax.Array
    q_rope: jax.Array
    c: jax.Array
    k_rope: jax.Array
    k_up: jax.Array
    v_up: jax.Array

    def attend(
        self,
        positions_BT: Int[Array, "B T"],
        cache: AbsorbedCache | NoCache | None,
        spec: AttentionSpec,
    ) -> tuple[Float[Array, "B T N V"], AbsorbedCache | NoCache | None]:
        """Head outputs: keys and values expanded without a cache, projections absorbed with one."""
        cache = NoCache() if cache is None else cache
        if isinstance(cache, NoCache):
            q = jnp.concatenate([self.q_nope, self.q_rope], axis=-1)
            k_nope = jnp.einsum("btl,lnh->btnh", self.c, self.k_up)
            shared = jnp.broadcast_to(self.k_rope[:, :, None], self.q_rope.shape)
            k = jnp.concatenate([k_nope, shared], axis=-1)
            v = jnp.einsum("btl,lnh->btnh", self.c, self.v_up)
            return cache.attend(q, k, v, positions_BT, spec)
        q_latent = jnp.einsum("btnh,lnh->btnl", self.q_nope, self.k_up)
        out_BTNL, cache = cache.attend_absorbed(
            q_latent, self.q_rope, self.c, self.k_rope, positions_BT, spec
        )
        return jnp.einsum("btnl,lnv->btnv", out_BTNL, self.v_up), cache


def down_project(
    module: nn.Module, name: str, x_BTD: Float[Array, "B T D"], width: int, bias: bool
) -> Float[Array, "B T width"]:
    """x · W into a latent; parameters `name` [D, width] and `name`_bias."""
    weight = declare(module, name, (x_BTD.shape[-1], width), ("embed", "latent"))
    y = matmul(x_BTD, weight)
    return y + zeros(module, f"{name}_bias", (width,), ("latent",))[None, None] if bias else y


def latent_norm(
    module: nn.Module, name: str, x_BTL: Float[Array, "B T L"], config: NormConfig | None
) -> Float[Array, "B T L"]:
    """RMS norm of a latent (parameter `name`); None leaves it."""
    if config is None:
        return x_BTL
    return rms_norm(x_BTL, norm_weight(module, name, x_BTL.shape[-1], config), config)
