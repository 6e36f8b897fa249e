"""Attention over factored keys and values: TransMLA's `equal_cache` (arXiv 2502.07864v2)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.cache import Cache, DenseCache, NoCache
from kvjax.config import EqualCacheConfig
from kvjax.nn.gqa import attention_spec, output, projection, qk_norm, qk_norm_weight
from kvjax.nn.params import declare
from kvjax.nn.rope import rope


class EqualCacheAttention(nn.Module):
    """Keys and values of all N heads from latents of GQA's cache size.

    C latent heads of X (keys) and Y (values) numbers are cached, C·X = C·Y = K·H. The
    up-projections k_up [C, X, N/C, H] and v_up [C, Y, N/C, H] give each query head its own keys
    and values. With a cache the value up-projection comes after the attention (absorbed).
    """

    config: EqualCacheConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        cache: Cache | NoCache | None,
        lengths_B: Int[Array, " B"],
    ) -> tuple[Float[Array, "B T D"], Cache | NoCache | None]:
        """Attention output and the cache with the new latents; see `Transformer.__call__`."""
        c, base = self.config, self.config.base
        C, N, H = c.latent_heads, base.num_heads, base.head_dim
        rotate_after = c.rope_site == "after_up"
        with jax.named_scope("qkv"):
            q_BTNH = projection(self, "q", x_BTD, N, H, "heads", base.qkv_bias)
            q_norm = qk_norm_weight(self, "q_norm", N, base)
            # Normed and rotated are the keys of all query heads, or the latent seen as heads.
            rotated_heads = N if rotate_after else C * c.key_rank // H
            k_norm = qk_norm_weight(self, "k_norm", rotated_heads, base)
            k_BTCX = projection(self, "k_down", x_BTD, C, c.key_rank, "kv", base.qkv_bias)
            v_BTCY = projection(self, "v_down", x_BTD, C, c.value_rank, "kv", base.qkv_bias)
            axes = ("kv", "latent", "heads", "head_dim")
            k_up = declare(self, "k_up", (C, c.key_rank, N // C, H), axes, in_axis=1)
            v_up = declare(self, "v_up", (C, c.value_rank, N // C, H), axes, in_axis=1)
        with jax.named_scope("rope"):
            q_BTNH = rope(qk_norm(q_BTNH, q_norm, base.norm), positions_BT, lengths_B, base.rope)

        def finish(k_BSNH, positions_BS):
            """Key norm and RoPE, on whichever side of the up-projection they belong."""
            return rope(qk_norm(k_BSNH, k_norm, base.norm), positions_BS, lengths_B, base.rope)

        if rotate_after:

            def keys(latent_BSCX, positions_BS):
                return finish(up_project(latent_BSCX, k_up), positions_BS)
        else:
            as_heads = k_BTCX.reshape(*k_BTCX.shape[:2], rotated_heads, H)
            k_BTCX = finish(as_heads, positions_BT).reshape(k_BTCX.shape)

            def keys(latent_BSCX, positions_BS):
                return up_project(latent_BSCX, k_up)

        spec = attention_spec(base)
        cache = NoCache() if cache is None else cache
        if isinstance(cache, NoCache):
            k_BTNH, v_BTNH = keys(k_BTCX, positions_BT), up_project(v_BTCY, v_up)
            out_BTNH, cache = cache.attend(q_BTNH, k_BTNH, v_BTNH, positions_BT, spec)
        else:
            if rotate_after:
                out_BTNY, cache = cache.attend(q_BTNH, k_BTCX, v_BTCY, positions_BT, spec, keys)
            else:
                q_BTNX = absorb_query(q_BTNH, k_up)
                out_BTNY, cache = cache.attend(q_BTNX, k_BTCX, v_BTCY, positions_BT, spec)
            out_BTNH = up_project_output(out_BTNY, v_up)
        with jax.named_scope("out"):
            return output(self, out_BTNH, x_BTD.shape[-1], base.out_bias), cache

    @staticmethod
    def init_cache(config: EqualCacheConfig, batch_size: int, max_len: int, dtype) -> DenseCache:
        """An empty cache of latents: C·(X + Y) = 2·K·H numbers a token."""
        return DenseCache.create(
            batch_size, config.latent_heads, max_len, config.key_rank, config.value_rank, dtype
        )


def up_project(
    latent_BSCX: Float[Array, "B S C X"], up_CXGH: Float[Array, "C X G H"]
) -> Float[Array, "B S N H"]:
    """Latents to the keys or values of all N = C·G query heads."""
    y = jnp.einsum("bscx,cxgh->bscgh", latent_BSCX, up_CXGH)
    return y.reshape(*y.shape[:2], -1, y.shape[-1])


def absorb_query(
    q_BTNH: Float[Array, "B T N H"], up_CXGH: Float[Array, "C X G H"]
) -> Float[Array, "B T N X"]:
    """Queries moved through the key up-projection, so that they meet the latents directly."""
    C, X, G, H = up_CXGH.shape
    q = q_BTNH.reshape(*q_BTNH.shape[:2], C, G, H)
    return jnp.einsum("btcgh,cxgh->btcgx", q, up_CXGH).reshape(*q_BTNH.shape[:2], C * G, X)


def up_project_output(
    out_BTNY: Float[Array, "B T N Y"], up_CYGH: Float[Array, "C Y G H"]
) -> Float[Array, "B T N H"]:
    """Attention-weighted latents to head outputs: the absorbed value up-projection."""
    C, Y, G, H = up_CYGH.shape
    out = out_BTNY.reshape(*out_BTNY.shape[:2], C, G, Y)
    return jnp.einsum("btcgy,cygh->btcgh", out, up_CYGH).reshape(*out_BTNY.shape[:2], C * G, H)
