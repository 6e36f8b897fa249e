"""Latent attention over the keys and values of GQA: TransMLA's `decoupled`, norms kept."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.cache import AbsorbedCache, LatentCache, NoCache
from kvjax.config import DecoupledConfig
from kvjax.nn.gqa import attention_spec, output, projection, qk_norm, qk_norm_weight
from kvjax.nn.matmul import matmul
from kvjax.nn.mla import LatentHeads
from kvjax.nn.params import declare
from kvjax.nn.rope import rope


class DecoupledAttention(nn.Module):
    """Projections and QK-norm of GQA, then one linear map to a latent and a rotary key.

    `down` [2·K·H, L + R] takes keys (normed, not rotated) and values to what is cached; `q_rope`
    [N, H, R] takes each head's query to its rotary part, `k_up` [L, N, H] and `v_up` [L, N, V]
    take the latent to each head's keys and values (TransMLA, arXiv 2502.07864v5).
    """

    config: DecoupledConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        cache: AbsorbedCache | NoCache | None,
        lengths_B: Int[Array, " B"],
    ) -> tuple[Float[Array, "B T D"], AbsorbedCache | NoCache | None]:
        """Attention output and the cache with the new latents; see `Transformer.__call__`."""
        c, base = self.config, self.config.base
        N, K, H, L, R = base.num_heads, base.num_kv_heads, base.head_dim, c.rank, c.rope_dim
        with jax.named_scope("qkv"):
            q_BTNH = projection(self, "q", x_BTD, N, H, "heads", base.qkv_bias)
            k_BTKH = projection(self, "k", x_BTD, K, H, "kv", base.qkv_bias)
            v_BTKH = projection(self, "v", x_BTD, K, H, "kv", base.qkv_bias)
            q_BTNH = qk_norm(q_BTNH, qk_norm_weight(self, "q_norm", N, base), base.norm)
            k_BTKH = qk_norm(k_BTKH, qk_norm_weight(self, "k_norm", K, base), base.norm)
            down = declare(self, "down", (2 * K * H, L + R), (None, "latent"))
            q_rope_NHR = declare(self, "q_rope", (N, H, R), ("heads", "head_dim", None), in_axis=1)
            k_up_LNH = declare(self, "k_up", (L, N, H), ("latent", "heads", "head_dim"))
            v_up_LNV = declare(self, "v_up", (L, N, c.v_head_dim), ("latent", "heads", "head_dim"))
            kv_BTX = jnp.concatenate([k_BTKH, v_BTKH], axis=2).reshape(*x_BTD.shape[:2], -1)
            c_BTL, k_rope_BTR = jnp.split(matmul(kv_BTX, down), [L], axis=-1)
            q_rope_BTNR = jnp.einsum("btnh,nhr->btnr", q_BTNH, q_rope_NHR)
        with jax.named_scope("rope"):
            q_rope_BTNR = rope(q_rope_BTNR, positions_BT, lengths_B, c.rope)
            k_rope_BTR = rope(k_rope_BTR[:, :, None], positions_BT, lengths_B, c.rope)[:, :, 0]
        heads = LatentHeads(q_BTNH, q_rope_BTNR, c_BTL, k_rope_BTR, k_up_LNH, v_up_LNV)
        out_BTNV, cache = heads.attend(positions_BT, cache, attention_spec(base))
        with jax.named_scope("out"):
            return output(self, out_BTNV, x_BTD.shape[-1], c.out_bias), cache

    @staticmethod
    def init_cache(config: DecoupledConfig, batch_size: int, max_len: int, dtype) -> LatentCache:
        """An empty cache: L + R numbers a token."""
        return LatentCache.create(batch_size, max_len, config.rank, config.rope_dim, dtype)
