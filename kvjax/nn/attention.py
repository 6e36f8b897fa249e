"""The four forms of attention. They differ in what they cache; the cache computes the attention.

`gqa` caches the keys and values of its KV heads. `equal_cache` caches latents of the same size.
`mla` (DeepSeek-V3) and `decoupled` (for converted checkpoints with QK-norm) cache one latent and
one rotary key for all heads. All take the same arguments, see `kvjax.nn.transformer.Block.apply`;
kvjax.nn.params has their parameters.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.cache import AbsorbedCache, AttentionSpec, Cache, NoCache
from kvjax.config import DecoupledConfig, EqualCacheConfig, GQAConfig, MLAConfig, NormConfig
from kvjax.nn.layers import Params, matmul, norm, project, rms_norm, rope
from kvjax.nn.params import rotated_heads


def gqa(
    config: GQAConfig,
    params: Params,
    x_BTD: Float[Array, "B T D"],
    positions_BT: Int[Array, "B T"],
    cache: Cache | NoCache | None,
    lengths_B: Int[Array, " B"],
) -> tuple[Float[Array, "B T D"], Cache | NoCache | None]:
    """N query heads share K heads of keys and values; the cache holds rotated keys and values."""
    with jax.named_scope("qkv"):
        q_BTNH, k_BTKH, v_BTKH = gqa_heads(config, params, x_BTD)
    with jax.named_scope("rope"):
        q_BTNH = rope(q_BTNH, positions_BT, lengths_B, config.rope)
        k_BTKH = rope(k_BTKH, positions_BT, lengths_B, config.rope)
    out_BTNH, cache = (NoCache() if cache is None else cache).attend(
        q_BTNH, k_BTKH, v_BTKH, positions_BT, config.spec
    )
    with jax.named_scope("out"):
        return output(params, out_BTNH), cache


def gqa_heads(
    config: GQAConfig, params: Params, x_BTD: Float[Array, "B T D"]
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Queries, keys and values of the attention input, with QK-norm and without RoPE.

    Args:
        params: q, k and v [D, heads, H]; if the model has them, the biases q_bias, k_bias and
            v_bias [heads, H] and the norm weights q_norm and k_norm.
    """

    def heads(name: str) -> jax.Array:
        return qk_norm(params, f"{name}_norm", project(params, name, x_BTD), config.norm)

    return heads("q"), heads("k"), heads("v")


def qk_norm(
    params: Params, name: str, x_BTNH: Float[Array, "B T N H"], config: NormConfig
) -> Float[Array, "B T N H"]:
    """RMS norm over one head or over all heads, as wide as the weight `name`.

    Without this parameter x is unchanged.
    """
    if name not in params:
        return x_BTNH
    rows = x_BTNH.reshape(*x_BTNH.shape[:2], -1, params[name].shape[0])
    return rms_norm(rows, params[name], config).reshape(x_BTNH.shape)


def output(params: Params, out_BTNH: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
    """Projects heads to the residual stream, with o [N, H, D] and, if there is one, o_bias [D]."""
    weight = params["o"]
    # With two contracted axes XLA:CPU would transpose the weight in every step.
    y = matmul(out_BTNH.reshape(*out_BTNH.shape[:2], -1), weight.reshape(-1, weight.shape[-1]))
    return y + params["o_bias"][None, None] if "o_bias" in params else y


def equal_cache(
    config: EqualCacheConfig,
    params: Params,
    x_BTD: Float[Array, "B T D"],
    positions_BT: Int[Array, "B T"],
    cache: Cache | NoCache | None,
    lengths_B: Int[Array, " B"],
) -> tuple[Float[Array, "B T D"], Cache | NoCache | None]:
    """Keys and values of all N heads from latents of GQA's cache size.

    The cache holds C latent heads of X (keys) and Y (values) numbers, with C·X = C·Y = K·H. The
    up-projections k_up [C, X, N/C, H] and v_up [C, Y, N/C, H] give each query head separate keys
    and values. With a cache the value up-projection follows the attention (absorbed).
    """
    base = config.base
    rotate_after = config.rope_site == "after_up"
    k_up, v_up = params["k_up"], params["v_up"]
    with jax.named_scope("qkv"):
        q_BTNH = project(params, "q", x_BTD)
        k_BTCX = project(params, "k_down", x_BTD)
        v_BTCY = project(params, "v_down", x_BTD)
    with jax.named_scope("rope"):
        q_BTNH = qk_norm(params, "q_norm", q_BTNH, base.norm)
        q_BTNH = rope(q_BTNH, positions_BT, lengths_B, base.rope)

    def finish(k_BSNH, positions_BS):
        """Key norm and RoPE, before or after the up-projection as `rope_site` says."""
        k_BSNH = qk_norm(params, "k_norm", k_BSNH, base.norm)
        return rope(k_BSNH, positions_BS, lengths_B, base.rope)

    # Rotation does not commute with the up-projection, so its place decides what is cached:
    # latents without positions (keys are rebuilt in every step), or rotated latents.
    if rotate_after:

        def keys(latent_BSCX, positions_BS):
            return finish(up_project(latent_BSCX, k_up), positions_BS)
    else:
        as_heads = k_BTCX.reshape(*k_BTCX.shape[:2], rotated_heads(config), base.head_dim)
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
        return output(params, out_BTNH), cache


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


def mla(
    config: MLAConfig,
    params: Params,
    x_BTD: Float[Array, "B T D"],
    positions_BT: Int[Array, "B T"],
    cache: AbsorbedCache | NoCache | None,
    lengths_B: Int[Array, " B"],
) -> tuple[Float[Array, "B T D"], AbsorbedCache | NoCache | None]:
    """Multi-head latent attention: expanded keys and values without a cache, absorbed with one.

    The cache holds L + R numbers per token for all heads: the normed latent c and the rotary key.
    """
    with jax.named_scope("qkv"):
        q_BTNH = mla_queries(config, params, x_BTD)
        # One product gives the latent and the rotary key that all heads share.
        joint = project(params, "kv_a", x_BTD)
        c_BTL, k_rope_BTR = jnp.split(joint, [config.kv_lora_rank], axis=-1)
        c_BTL = norm(params, "kv_norm", c_BTL, config.latent_norm)
    with jax.named_scope("rope"):
        q_nope_BTNH, q_rope_BTNR = jnp.split(q_BTNH, [config.qk_nope_head_dim], axis=-1)
        q_rope_BTNR = rope(q_rope_BTNR, positions_BT, lengths_B, config.rope)
        k_rope_BTR = rope(k_rope_BTR[:, :, None], positions_BT, lengths_B, config.rope)[:, :, 0]
    up = params["k_up"], params["v_up"]
    heads = LatentHeads(q_nope_BTNH, q_rope_BTNR, c_BTL, k_rope_BTR, *up)
    out_BTNH, cache = heads.attend(positions_BT, cache, config.spec)
    with jax.named_scope("out"):
        return output(params, out_BTNH), cache


def mla_queries(
    config: MLAConfig, params: Params, x_BTD: Float[Array, "B T D"]
) -> Float[Array, "B T N H"]:
    """Queries of width nope + rope; through a low-rank latent if the config has q_lora_rank."""
    if config.q_lora_rank is not None:
        x_BTD = norm(params, "q_norm", project(params, "q_a", x_BTD), config.latent_norm)
    return project(params, "q", x_BTD)


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


def decoupled(
    config: DecoupledConfig,
    params: Params,
    x_BTD: Float[Array, "B T D"],
    positions_BT: Int[Array, "B T"],
    cache: AbsorbedCache | NoCache | None,
    lengths_B: Int[Array, " B"],
) -> tuple[Float[Array, "B T D"], AbsorbedCache | NoCache | None]:
    """Projections and QK-norm of GQA, then one linear map to a latent and a rotary key.

    `down` [2·K·H, L + R] maps keys (normed, not rotated) and values to the cached latent and rotary
    key. `q_rope` [N, H, R] maps each head's query to its rotary part. `k_up` [L, N, H] and `v_up`
    [L, N, V] map the latent to each head's keys and values (TransMLA, arXiv 2502.07864v5).
    """
    base = config.base
    with jax.named_scope("qkv"):
        q_BTNH, k_BTKH, v_BTKH = gqa_heads(base, params, x_BTD)
        # The latent is a linear map of the keys after their norm, which `mla` could not express.
        kv_BTX = jnp.concatenate([k_BTKH, v_BTKH], axis=2).reshape(*x_BTD.shape[:2], -1)
        c_BTL, k_rope_BTR = jnp.split(matmul(kv_BTX, params["down"]), [config.rank], axis=-1)
        q_rope_BTNR = jnp.einsum("btnh,nhr->btnr", q_BTNH, params["q_rope"])
    with jax.named_scope("rope"):
        q_rope_BTNR = rope(q_rope_BTNR, positions_BT, lengths_B, config.rope)
        k_rope_BTR = rope(k_rope_BTR[:, :, None], positions_BT, lengths_B, config.rope)[:, :, 0]
    up = params["k_up"], params["v_up"]
    heads = LatentHeads(q_BTNH, q_rope_BTNR, c_BTL, k_rope_BTR, *up)
    out_BTNV, cache = heads.attend(positions_BT, cache, base.spec)
    with jax.named_scope("out"):
        return output(params, out_BTNV), cache
