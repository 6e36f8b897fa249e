"""The four forms of attention. They differ in what they cache; the cache computes the attention.

`GQA` caches the keys and values of its KV heads. `EqualCacheAttention` caches latents of the same
size. `MLA` (DeepSeek-V3) and `DecoupledAttention` (for converted checkpoints with QK-norm) cache
one latent and one rotary key for all heads.
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
    """x · W for all heads; declares `name` [D, heads, head_dim] and `name`_bias."""
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
    """Projects heads to the residual stream; declares o [N, H, D] and o_bias [D]."""
    shape = (*out_BTNH.shape[2:], width)
    weight = declare(module, "o", shape, ("heads", "head_dim", "embed"), in_axis=(0, 1))
    # With two contracted axes XLA:CPU would transpose the weight in every step.
    y = matmul(out_BTNH.reshape(*out_BTNH.shape[:2], -1), weight.reshape(-1, width))
    return y + zeros(module, "o_bias", (width,), ("embed",))[None, None] if bias else y


def qk_norm_weight(
    module: nn.Module, name: str, num_heads: int, config: GQAConfig
) -> jax.Array | None:
    """The weight of the norm on `num_heads` heads (parameter `name`); None without a norm."""
    if config.qk_norm is None:
        return None
    width = {"head": 1, "all": num_heads}[config.qk_norm] * config.head_dim
    return norm_weight(module, name, width, config.norm)


def qk_norm(
    x_BTNH: Float[Array, "B T N H"], weight: Float[Array, " W"] | None, config: NormConfig
) -> Float[Array, "B T N H"]:
    """RMS norm over one head or over all heads, as wide as the weight; None returns x unchanged."""
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
        params: q, k and v [D, heads, H]; if the model has them, the biases q_bias, k_bias and
            v_bias [heads, H] and the norm weights q_norm and k_norm.
    """

    def heads(name: str) -> jax.Array:
        y = project(x_BTD, params[name], params[f"{name}_bias"] if config.qkv_bias else None)
        return qk_norm(y, params.get(f"{name}_norm"), config.norm)

    return heads("q"), heads("k"), heads("v")


class EqualCacheAttention(nn.Module):
    """Keys and values of all N heads from latents of GQA's cache size.

    The cache holds C latent heads of X (keys) and Y (values) numbers, with C·X = C·Y = K·H. The
    up-projections k_up [C, X, N/C, H] and v_up [C, Y, N/C, H] give each query head separate keys
    and values. With a cache the value up-projection follows the attention (absorbed).
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
            # Norm and RoPE apply to the keys of all query heads, or to the latent seen as heads.
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
            """Key norm and RoPE, before or after the up-projection as `rope_site` says."""
            return rope(qk_norm(k_BSNH, k_norm, base.norm), positions_BS, lengths_B, base.rope)

        # Rotation does not commute with the up-projection, so its place decides what is cached:
        # latents without positions (keys are rebuilt in every step), or rotated latents.
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
        # Without a cache keys and values are expanded. With one, the up-projections move to the
        # query and to the output if they can, so that attention reads the latents.
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
    """The keys or values of all N = C·G query heads, from the latents."""
    y = jnp.einsum("bscx,cxgh->bscgh", latent_BSCX, up_CXGH)
    return y.reshape(*y.shape[:2], -1, y.shape[-1])


def absorb_query(
    q_BTNH: Float[Array, "B T N H"], up_CXGH: Float[Array, "C X G H"]
) -> Float[Array, "B T N X"]:
    """Queries multiplied by the key up-projection, so that they can attend to the latents."""
    C, X, G, H = up_CXGH.shape
    q = q_BTNH.reshape(*q_BTNH.shape[:2], C, G, H)
    return jnp.einsum("btcgh,cxgh->btcgx", q, up_CXGH).reshape(*q_BTNH.shape[:2], C * G, X)


def up_project_output(
    out_BTNY: Float[Array, "B T N Y"], up_CYGH: Float[Array, "C Y G H"]
) -> Float[Array, "B T N H"]:
    """Head outputs from attention-weighted latents: the absorbed value up-projection."""
    C, Y, G, H = up_CYGH.shape
    out = out_BTNY.reshape(*out_BTNY.shape[:2], C, G, Y)
    return jnp.einsum("btcgy,cygh->btcgh", out, up_CYGH).reshape(*out_BTNY.shape[:2], C * G, H)


class MLA(nn.Module):
    """Multi-head latent attention: expanded keys and values without a cache, absorbed with one.

    The cache holds L + R numbers per token for all heads: the normed latent c and the rotary key.
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
            # One product gives the latent and the rotary key that all heads share.
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
        """Queries of width nope + rope; through a low-rank latent if the config has q_lora_rank."""
        c = self.config
        head_dim = c.qk_nope_head_dim + c.qk_rope_head_dim
        if c.q_lora_rank is not None:
            x_BTD = down_project(self, "q_a", x_BTD, c.q_lora_rank, c.latent_bias)
            x_BTD = latent_norm(self, "q_norm", x_BTD, c.latent_norm)
        return projection(self, "q", x_BTD, c.num_heads, head_dim, "heads", c.query_bias)


class LatentHeads(NamedTuple):
    """The inputs of latent attention: each head's queries, and what all heads share.

    Attributes:
        q_nope, q_rope: [B, T, N, H] queries for the latent part, [B, T, N, R] rotated queries.
        c, k_rope: [B, T, L] latents and [B, T, R] rotated keys.
        k_up, v_up: [L, N, H] and [L, N, V], maps from the latent to each head's keys and values.
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
        """Head outputs: expanded keys and values without a cache, absorbed projections with one."""
        cache = NoCache() if cache is None else cache
        if isinstance(cache, NoCache):
            # Expanded: every head gets keys and values, and the shared rotary key.
            q = jnp.concatenate([self.q_nope, self.q_rope], axis=-1)
            k_nope = jnp.einsum("btl,lnh->btnh", self.c, self.k_up)
            shared = jnp.broadcast_to(self.k_rope[:, :, None], self.q_rope.shape)
            k = jnp.concatenate([k_nope, shared], axis=-1)
            v = jnp.einsum("btl,lnh->btnh", self.c, self.v_up)
            return cache.attend(q, k, v, positions_BT, spec)
        # Absorbed: q·(k_up·c) = (q·k_up)·c, so the cached latents serve as keys of all heads.
        q_latent = jnp.einsum("btnh,lnh->btnl", self.q_nope, self.k_up)
        out_BTNL, cache = cache.attend_absorbed(
            q_latent, self.q_rope, self.c, self.k_rope, positions_BT, spec
        )
        return jnp.einsum("btnl,lnv->btnv", out_BTNL, self.v_up), cache


def down_project(
    module: nn.Module, name: str, x_BTD: Float[Array, "B T D"], width: int, bias: bool
) -> Float[Array, "B T width"]:
    """x · W into a latent; declares `name` [D, width] and `name`_bias."""
    weight = declare(module, name, (x_BTD.shape[-1], width), ("embed", "latent"))
    y = matmul(x_BTD, weight)
    return y + zeros(module, f"{name}_bias", (width,), ("latent",))[None, None] if bias else y


def latent_norm(
    module: nn.Module, name: str, x_BTL: Float[Array, "B T L"], config: NormConfig | None
) -> Float[Array, "B T L"]:
    """RMS norm of a latent (parameter `name`); a None config returns the latent unchanged."""
    if config is None:
        return x_BTL
    return rms_norm(x_BTL, norm_weight(module, name, x_BTL.shape[-1], config), config)


class DecoupledAttention(nn.Module):
    """Projections and QK-norm of GQA, then one linear map to a latent and a rotary key.

    `down` [2·K·H, L + R] maps keys (normed, not rotated) and values to the cached latent and rotary
    key. `q_rope` [N, H, R] maps each head's query to its rotary part. `k_up` [L, N, H] and `v_up`
    [L, N, V] map the latent to each head's keys and values (TransMLA, arXiv 2502.07864v5).
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
            # The latent is a linear map of the keys after their norm, which `MLA` could not
            # express.
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
        """An empty cache: L + R numbers per token."""
        return LatentCache.create(batch_size, max_len, config.rank, config.rope_dim, dtype)
