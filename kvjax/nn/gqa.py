"""Grouped-query attention (arXiv 2305.13245)."""

import flax.linen as nn
import jax
from jaxtyping import Array, Float, Int

from kvjax.cache import AttentionSpec, Cache, DenseCache, NoCache
from kvjax.config import GQAConfig, NormConfig
from kvjax.nn.matmul import matmul
from kvjax.nn.norm import rms_norm
from kvjax.nn.params import declare, zeros
from kvjax.nn.rope import rope


class GQA(nn.Module):
    """N query heads share K heads of keys and values; the cache holds rotated keys and values."""

    config: GQAConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        cache: Cache | NoCache | None,
        lengths_B: Int[Array, " B"],
    ) -> tuple[Float[Array, "B T D"], Cache | NoCache | None]:
        """Attention output and the cache with the new entries; see `Transformer.__call__`."""
        c = self.config
        with jax.named_scope("qkv"):
            q_BTNH = projection(self, "q", x_BTD, c.num_heads, c.head_dim, "heads", c.qkv_bias)
            k_BTKH = projection(self, "k", x_BTD, c.num_kv_heads, c.head_dim, "kv", c.qkv_bias)
            v_BTKH = projection(self, "v", x_BTD, c.num_kv_heads, c.head_dim, "kv", c.qkv_bias)
            q_norm = qk_norm_weight(self, "q_norm", c.num_heads, c)
            k_norm = qk_norm_weight(self, "k_norm", c.num_kv_heads, c)
            q_BTNH, k_BTKH = qk_norm(q_BTNH, q_norm, c.norm), qk_norm(k_BTKH, k_norm, c.norm)
        with jax.named_scope("rope"):
            q_BTNH = rope(q_BTNH, positions_BT, lengths_B, c.rope)
            k_BTKH = rope(k_BTKH, positions_BT, lengths_B, c.rope)
        out_BTNH, cache = (NoCache() if cache is None else cache).attend(
            q_BTNH, k_BTKH, v_BTKH, positions_BT, attention_spec(c)
        )
        with jax.named_scope("out"):
            return output(self, out_BTNH, x_BTD.shape[-1], c.out_bias), cache

    @staticmethod
    def init_cache(config: GQAConfig, batch_size: int, max_len: int, dtype) -> DenseCache:
        """An empty cache: 2·K·H numbers a token."""
        K, H = config.num_kv_heads, config.head_dim
        return DenseCache.create(batch_size, K, max_len, H, H, dtype)


def attention_spec(config: GQAConfig) -> AttentionSpec:
    """What the cache must know to attend."""
    return AttentionSpec(config.scale, config.window, config.softcap)


def projection(
    module: nn.Module,
    name: str,
    x_BTD: Float[Array, "B T D"],
    heads: int,
    head_dim: int,
    head_axis: str,
    bias: bool,
) -> Float[Array, "B T heads head_dim"]:
    """x · W for all heads; parameters `name` [D, heads, head_dim] and `name`_bias."""
    shape = (x_BTD.shape[-1], heads, head_dim)
    weight = declare(module, name, shape, ("embed", head_axis, "head_dim"))
    y = matmul(x_BTD, weight)
    if bias:
        y += zeros(module, f"{name}_bias", shape[1:], (head_axis, "head_dim"))[None, None]
    return y


def output(
    module: nn.Module, out_BTNH: Float[Array, "B T N H"], width: int, bias: bool
) -> Float[Array, "B T D"]:
    """Heads back to the residual stream; parameters o [N, H, D] and o_bias [D]."""
    shape = (*out_BTNH.shape[2:], width)
    weight = declare(module, "o", shape, ("heads", "head_dim", "embed"), in_axis=(0, 1))
    # Two contracted axes would make XLA:CPU transpose the weight in every step.
    y = matmul(out_BTNH.reshape(*out_BTNH.shape[:2], -1), weight.reshape(-1, width))
    return y + zeros(module, "o_bias", (width,), ("embed",))[None, None] if bias else y


def qk_norm_weight(
    module: nn.Module, name: str, num_heads: int, config: GQAConfig
) -> jax.Array | None:
    """Weight of the norm on queries or keys of `num_heads` heads (parameter `name`), if any."""
    if config.qk_norm is None:
        return None
    width = {"head": 1, "all": num_heads}[config.qk_norm] * config.head_dim
    return norm_weight(module, name, width, config.norm)


def qk_norm(
    x_BTNH: Float[Array, "B T N H"], weight: Float[Array, " W"] | None, config: NormConfig
) -> Float[Array, "B T N H"]:
    """RMS norm over one head or over all of them, whichever the weight spans; None leaves x."""
    if weight is None:
        return x_BTNH
    rows = x_BTNH.reshape(*x_BTNH.shape[:2], -1, weight.shape[0])
    return rms_norm(rows, weight, config).reshape(x_BTNH.shape)


def norm_weight(module: nn.Module, name: str, width: int, config: NormConfig) -> jax.Array:
    """The weight of an RMS norm; starts at the identity."""
    return declare(
        module, name, (width,), (None,), init=nn.initializers.constant(1.0 - config.offset)
    )
