"""The four forms of attention. They differ in what they cache; the cache does the rest.

`GQA` caches the keys and values of its KV heads. `EqualCacheAttention` caches latents that are as
large. `MLA` (DeepSeek-V3) and `DecoupledAttention` (a converted checkpoint behind its QK-norm)
cache one latent and one rotary key for all heads.
"""

from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.cache import AbsorbedCache, AttentionSpec, Cache, LatentCache, NoCache
from kvjax.config import DecoupledConfig, EqualCacheConfig, GQAConfig, MLAConfig, NormConfig
from kvjax.nn.layers import declare, matmul, norm_weight, rms_norm, zeros
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
            params = gqa_params(self, c, x_BTD.shape[-1])
            q_BTNH, k_BTKH, v_BTKH = gqa_heads(c, params, x_BTD)
        with jax.named_scope("rope"):
            q_BTNH = rope(q_BTNH, positions_BT, lengths_B, c.rope)
            k_BTKH = rope(k_BTKH, positions_BT, lengths_B, c.rope)
        out_BTNH, cache = (NoCache() if cache is None else cache).attend(
            q_BTNH, k_BTKH, v_BTKH, positions_BT, c.spec
        )
        with jax.named_scope("out"):
            return output(self, out_BTNH, x_BTD.shape[-1], c.out_bias), cache


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
    axes = (head_axis, "head_dim")
    return project(x_BTD, weight, zeros(module, f"{name}_bias", shape[1:], axes) if bias else None)


def project(
    x_BTD: Float[Array, "B T D"],
    weight: Float[Array, "D heads head_dim"],
    bias: Float[Array, "heads head_dim"] | None,
) -> Float[Array, "B T heads head_dim"]:
    """x · W for all heads, plus the bias if there is one."""
    y = matmul(x_BTD, weight)
    return y if bias is None else y + bias[None, None]


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


def gqa_params(module: nn.Module, config: GQAConfig, width: int) -> dict[str, jax.Array]:
    """Declares the parameters of `gqa_heads` for inputs of `width` numbers."""
    params = {}
    counts = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
    for name, count in counts.items():
        shape, axes = (count, config.head_dim), ("heads" if name == "q" else "kv", "head_dim")
        params[name] = declare(module, name, (width, *shape), ("embed", *axes))
        if config.qkv_bias:
            params[f"{name}_bias"] = zeros(module, f"{name}_bias", shape, axes)
    for name in "qk":
        weight = qk_norm_weight(module, f"{name}_norm", counts[name], config)
        if weight is not None:
            params[f"{name}_norm"] = weight
    return params


def gqa_heads(
    config: GQAConfig, params: Mapping[str, jax.Array], x_BTD: Float[Array, "B T D"]
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Queries, keys and values of the attention input, with QK-norm and without RoPE.

    Args:
        params: q, k and v [D, heads, H], their biases q_bias, k_bias and v_bias [heads, H], and
            the weights q_norm and k_norm, where the model has them.
    """

    def heads(name: str) -> jax.Array:
        y = project(x_BTD, params[name], params[f"{name}_bias"] if config.qkv_bias else None)
        return qk_norm(y, params.get(f"{name}_norm"), config.norm)

    return heads("q"), heads("k"), heads("v")


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

        spec = base.spec
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
        out_BTNH, cache = heads.attend(positions_BT, cache, c.spec)
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
            params = gqa_params(self, base, x_BTD.shape[-1])
            q_BTNH, k_BTKH, v_BTKH = gqa_heads(base, params, x_BTD)
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
        out_BTNV, cache = heads.attend(positions_BT, cache, base.spec)
        with jax.named_scope("out"):
            return output(self, out_BTNV, x_BTD.shape[-1], c.out_bias), cache

    @staticmethod
    def init_cache(config: DecoupledConfig, batch_size: int, max_len: int, dtype) -> LatentCache:
        """An empty cache: L + R numbers a token."""
        return LatentCache.create(batch_size, max_len, config.rank, config.rope_dim, dtype)
