"""GQA → factored K and V at an equal cache (TransMLA v1 and v2, arXiv 2502.07864v2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from kvjax.config import EqualCacheConfig, GQAConfig
from kvjax.finite import check_params, rounded
from kvjax.mesh import automatic_axes, on_automatic_mesh
from kvjax.nn import Transformer
from kvjax.transmla.inits import (
    INITS,
    Factors,
    Init,
    check_factors,
    commutes_with_rope,
    is_selector,
    resolve_init,
)
from kvjax.transmla.layer import gqa_layers, with_attention

ROPE_SITES = ("after_up", "before_up")


@automatic_axes()
def to_equal_cache(
    model: Transformer,
    params: Mapping[str, Any],
    *,
    init: str | Init = "svd_global",
    rope_site: str = "after_up",
    value_init: str | Init | None = None,
) -> tuple[Transformer, dict[str, Any]]:
    """Factors W_K and W_V of every layer into down · up and caches x · down, as large as before.

    The logits stay what they are (up to rounding); trained from here, every query head can get
    keys and values of its own. docs/transmla.md has the table of valid pairs.

    Args:
        params: of `model`; only attention weights are replaced, the rest is shared with the result.
        init: how W_K is factored: a name from `INITS`, or a function (see kvjax.transmla.inits).
        rope_site: "after_up" (the paper: key norm and RoPE on the up-projected keys, rebuilt at
            decode) or "before_up" (on the latent, so that the up-projection is absorbed into q).
        value_init: how W_V is factored; None: as `init`.

    Returns:
        The converted model and its parameters, in the dtype of the source.

    Raises:
        ValueError: an unknown name, a layer that is not GQA, an init that is not exact with this
            rope_site, or weights that hold NaN, before or after.
    """
    params = on_automatic_mesh(params)
    check_params(params)
    inits = checked_inits(init, value_init, rope_site)
    converted = [
        equal_cache_layer(index, base, params[f"layers_{index}"]["attn"], inits, rope_site)
        for index, base in enumerate(gqa_layers(model))
    ]
    return with_attention(model, params, converted)


def checked_inits(
    init: str | Init, value_init: str | Init | None, rope_site: str
) -> tuple[Init, Init]:
    """The inits of keys and values by their names; see `to_equal_cache`.

    Raises:
        ValueError: an unknown name, of an init or of the rope_site.
    """
    if rope_site not in ROPE_SITES:
        raise ValueError(f"rope_site {rope_site!r} is none of {', '.join(ROPE_SITES)}")
    key_init = resolve_init(init)
    return key_init, key_init if value_init is None else resolve_init(value_init)


def equal_cache_layer(
    index: int,
    base: GQAConfig,
    attn: dict[str, Any],
    inits: tuple[Init, Init],
    rope_site: str,
) -> tuple[EqualCacheConfig, dict[str, Any]]:
    """Converts the attention of one layer, which depends on no other.

    Args:
        index: of the layer, for errors.
        base, attn: its attention and the parameters of that.
        inits, rope_site: from `checked_inits`.

    Returns:
        The converted attention and its parameters, in the dtype of the source.

    Raises:
        ValueError: an init that is not exact with this rope_site.
    """
    keys = _factor(attn, "k", inits[0], base)
    values = _factor(attn, "v", inits[1], base, rotates=False)
    if rope_site == "before_up":
        _check_before_up(keys, base, index)
    if keys.up.shape[0] != values.up.shape[0]:
        keys, values = keys.wide(), values.wide()
    config = EqualCacheConfig(
        base,
        latent_heads=keys.up.shape[0],
        key_rank=keys.up.shape[1],
        value_rank=values.up.shape[1],
        rope_site=rope_site,
    )
    return config, _convert_params(attn, keys, values, config)


def _factor(
    attn: dict[str, Any], name: str, init: Init, base: GQAConfig, rotates: bool = True
) -> Factors:
    """Factors of projection `name`, its bias as one more input row."""
    weight = np.asarray(attn[name]).astype(np.float64)
    if base.qkv_bias:
        bias = np.asarray(attn[f"{name}_bias"]).astype(np.float64)
        weight = np.concatenate([weight, bias[None]])
    repeats = base.num_heads // base.num_kv_heads
    factors = init(weight, repeats, base.rope if rotates else None)
    check_factors(factors, weight, repeats)
    return factors


def _check_before_up(keys: Factors, base: GQAConfig, index: int) -> None:
    """What follows the key projection, norm and RoPE, must commute with the up-projection."""
    if base.qk_norm is not None and not is_selector(keys.up):
        raise ValueError(
            f"layer {index} norms its keys: rope_site 'before_up' is exact with init 'identity' "
            f"only; 'after_up' with any of {', '.join(INITS)}"
        )
    if not commutes_with_rope(keys.up, base.rope):
        raise ValueError(
            f"layer {index}: this init's up-projection does not commute with RoPE; rope_site "
            f"'before_up' is exact with init 'identity' or 'svd_complex', 'after_up' with any of "
            f"{', '.join(INITS)}"
        )


def _convert_params(
    attn: dict[str, Any], keys: Factors, values: Factors, config: EqualCacheConfig
) -> dict[str, Any]:
    """Parameters of `EqualCacheAttention`, cast once to the dtype of the source."""
    base = config.base
    dropped = {"k", "v", "k_bias", "v_bias"}
    new = {name: leaf for name, leaf in attn.items() if name not in dropped}
    for name, factors in (("k", keys), ("v", values)):
        dtype = attn[name].dtype
        down, bias = np.split(factors.down, [attn[name].shape[0]])
        new[f"{name}_down"] = rounded(down, dtype)
        new[f"{name}_up"] = rounded(factors.up, dtype)
        if base.qkv_bias:
            new[f"{name}_down_bias"] = rounded(bias[0], dtype)
    if base.qk_norm == "all" and config.rope_site == "after_up":
        # One rms over all heads, which the repetition leaves as it is.
        per_head = attn["k_norm"].reshape(base.num_kv_heads, base.head_dim)
        new["k_norm"] = jnp.repeat(per_head, base.num_heads // base.num_kv_heads, 0).reshape(-1)
    return new
