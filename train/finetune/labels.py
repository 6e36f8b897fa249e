"""Which parameters train: paths by pattern, and a split that keeps gradients off the others.

Parameters are flat here: a dict from "layers_0/attn/k_up" to an array.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from kvjax.config import DecoupledConfig, EqualCacheConfig, GQAConfig, MLAConfig
from kvjax.nn import Transformer

Flat = dict[str, Any]

KV_NAMES = {
    GQAConfig: ("k", "v", "k_bias", "v_bias"),
    EqualCacheConfig: ("k_down", "k_up", "v_down", "v_up", "k_down_bias", "v_down_bias"),
    MLAConfig: ("kv_a", "kv_a_bias", "kv_norm", "k_up", "v_up"),
    DecoupledConfig: ("k", "v", "k_bias", "v_bias", "down", "k_up", "v_up"),
}
"""What lies between a layer's input and its heads' keys and values, for every attention."""

GROUPS = ("kv_only", "attention", "all")


def trainable_paths(
    model: Transformer, params: Mapping[str, Any], which: Sequence[str]
) -> set[str]:
    """Paths of the parameters that train.

    Args:
        which: names of GROUPS and patterns of the form "layers_*/attn/q" (`fnmatch`; "*" matches
            "/" too). "kv_only" is what is told of TransMLA v1 and v2 (arXiv 2502.07864): the
            converted K and V factors, or W_K and W_V of a model with GQA. The authors' released
            script trains the up-projections only: "layers_*/attn/[kv]_up".

    Raises:
        ValueError: a pattern that matches nothing; lists what there is in the first layer.
    """
    paths = set(flatten(params))
    chosen: set[str] = set()
    for pattern in which:
        found = _match(model, paths, pattern)
        if not found:
            near = sorted(path for path in paths if not path.startswith("layers_") or "_0/" in path)
            raise ValueError(
                f"{pattern!r} matches no parameter, expected one of {', '.join(GROUPS)} or a "
                f"pattern for paths like {', '.join(near)}"
            )
        chosen |= found
    if not chosen:
        raise ValueError(f"got nothing to train, expected some of {', '.join(GROUPS)} or patterns")
    return chosen


def _match(model: Transformer, paths: set[str], pattern: str) -> set[str]:
    if pattern == "all":
        return paths
    if pattern == "attention":
        return {path for path in paths if fnmatch.fnmatchcase(path, "layers_*/attn/*")}
    if pattern == "kv_only":
        named = {
            f"layers_{index}/attn/{name}"
            for index, layer in enumerate(model.config.layers)
            for name in KV_NAMES[type(layer.attention)]
        }
        return paths & named
    return {path for path in paths if fnmatch.fnmatchcase(path, pattern)}


def flatten(params: Mapping[str, Any]) -> Flat:
    """Nested parameters as a flat dict."""
    return flatten_dict(dict(params), sep="/")


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    return unflatten_dict(dict(flat), sep="/")


def split(params: Mapping[str, Any], paths: set[str]) -> tuple[Flat, Flat]:
    """(trainable, frozen), both flat."""
    flat = flatten(params)
    trainable = {path: leaf for path, leaf in flat.items() if path in paths}
    return trainable, {path: leaf for path, leaf in flat.items() if path not in paths}
