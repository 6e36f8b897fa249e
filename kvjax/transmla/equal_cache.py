"""GQA → factored K and V with a cache of the same size (TransMLA v1 and v2, arXiv 2502.07864v2).

`to_equal_cache` converts a model in memory. Layers don't depend on each other, so
`equal_cache_layer` can convert a checkpoint one layer at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from kvjax.checks import check_params, rounded
from kvjax.config import EqualCacheConfig, GQAConfig
from kvjax.mesh import automatic_axes, on_automatic_mesh
from kvjax.nn import Transformer
from kvjax.nn.checks import check_fits
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
    """Factors W_K and W_V of every layer into down · up; the cache holds x · down.

    The logits do not change (up to rounding). When the result is trained, every query head can
    learn its own keys and values. docs/transmla.md has the table of valid pairs of `init` and
    `rope_site`.

    Examples:
        >>> mla_model, mla_params = kvjax.transmla.to_equal_cache(model, params)

    Args:
        model: with GQA in every layer.
        params: of `model`. On a mesh, the result is placed on the same mesh.
        init: how W_K is factored: a name from `INITS`, or a function (see kvjax.transmla.inits).
        rope_site: "after_up" applies key norm and RoPE to the up-projected keys, as in the paper;
            a decode step rebuilds the keys. "before_up" applies them to the latent, so that the
            up-projection can be absorbed into the queries.
        value_init: how W_V is factored; None: like `init`.

    Returns:
        The converted model and its parameters, in the dtype of the source. Parameters outside of
        the attention are shared with `params`.

    Raises:
        ValueError: an unknown name, a layer that is not GQA, an init that is not exact with this
            rope_site, or weights that hold NaN before or after the conversion.
    """
    check_fits(model, params)
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
    """The functions that factor keys and values; the arguments are those of `to_equal_cache`.

    Raises:
        ValueError: an unknown init or rope_site.
    """
    if rope_site not in ROPE_SITES:
        raise ValueError(f"rope_site {rope_site!r} is not one of {', '.join(ROPE_SITES)}")
    key_init = resolve_init(init)
    return key_init, key_init if value_init is None else resolve_init(value_init)


def equal_cache_layer(
    index: int,
    base: GQAConfig,
    attn: dict[str, Any],
    inits: tuple[Init, Init],
    rope_site: str,
) -> tuple[EqualCacheConfig, dict[str, Any]]:
    """Converts the attention of one layer.

    Args:
        index: number of the layer, for errors.
        base, attn: the attention of the layer and its parameters.
        inits: from `checked_inits`.

    Returns:
        The config of the converted attention and its parameters, in the dtype of the source.

    Raises:
        ValueError: an init that is not exact with this rope_site.
    """
    keys = _factor(attn, "k", inits[0], base)
    values = _factor(attn, "v", inits[1], base, rotates=False)
    if rope_site == "before_up":
        _check_before_up(keys, base, index)
    # The cache has one number of latent heads for keys and values.
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
    """The factors of projection `name`; its bias is one more input row of the weight."""
    weight = np.asarray(attn[name]).astype(np.float64)
    if base.qkv_bias:
        bias = np.asarray(attn[f"{name}_bias"]).astype(np.float64)
        weight = np.concatenate([weight, bias[None]])
    repeats = base.num_heads // base.num_kv_heads
    factors = init(weight, repeats, base.rope if rotates else None)
    check_factors(factors, weight, repeats)
    return factors


def _check_before_up(keys: Factors, base: GQAConfig, index: int) -> None:
    """Refuses an up-projection of the keys that does not commute with key norm and RoPE."""
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
    """Parameters of equal-cache attention, cast once to the dtype of the source."""
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
        # One rms over all heads: it stays the same when all heads are repeated.
        per_head = attn["k_norm"].reshape(base.num_kv_heads, base.head_dim)
        new["k_norm"] = jnp.repeat(per_head, base.num_heads // base.num_kv_heads, 0).reshape(-1)
    return new
