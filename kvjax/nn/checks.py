"""Checks of what a model is given: its parameters, token ids, positions and caches."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from kvjax.cache import DenseCache, LatentCache
from kvjax.config import ModelConfig
from kvjax.nn.params import param_shapes


def check_fits(model: Any, params: Any) -> None:
    """Refuses a model that is none, and parameters of another model.

    Of parameters that are read lazily only the names of the parts are compared.

    Raises:
        ValueError: names the first parameters that are missing, unknown or of another shape.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, ModelConfig):
        raise ValueError(
            f"model is {type(model).__name__}, expected a kvjax.Transformer: "
            "model, params = kvjax.load(PATH)"
        )
    check_params_fit(config, params)


def check_params_fit(config: ModelConfig, params: Any) -> None:
    """`check_fits` for the configuration of a model."""
    if not isinstance(params, Mapping):
        raise ValueError(
            f"params is {type(params).__name__}, expected the dict of kvjax.load's second result"
        )
    if set(params) == {"params"}:
        raise ValueError("params is {'params': …}, expected the dict inside: params['params']")
    found = list(_unlike(_shapes(config), params))
    if found:
        more = f"; and {len(found) - 2} more" if len(found) > 2 else ""
        raise ValueError(f"params do not fit the model: {'; '.join(found[:2])}{more}")


@functools.lru_cache(maxsize=8)
def _shapes(config: ModelConfig) -> Any:
    return param_shapes(config)


def _unlike(wanted: Mapping[str, Any], got: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """A line for each parameter that only one of the two has, or that has another shape."""
    yield from (f"{prefix}{name} is missing" for name in wanted if name not in got)
    yield from (f"{prefix}{name} is unknown" for name in got if name not in wanted)
    if not isinstance(got, dict):  # an access would read a part from disk
        return
    for name, part in wanted.items():
        if isinstance(part, Mapping):
            yield from _unlike(part, got.get(name, part), f"{prefix}{name}/")
        elif (shape := getattr(got.get(name, part), "shape", None)) != part.shape:
            yield f"{prefix}{name} has shape {shape}, expected {part.shape}"


def check_tokens(tokens: Any) -> None:
    """Raises ValueError unless `tokens` is an integer array [B, T] with at least one token."""
    wrong = getattr(tokens, "ndim", 0) != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer)
    if wrong or not tokens.size:
        raise ValueError(f"got tokens {_kind(tokens)}, expected an integer array [B, T]")


def check_beside(tokens: Any, **given: Any) -> None:
    """Raises ValueError for integer arrays that do not have the shape of `tokens`; None passes."""
    for name, value in given.items():
        same = getattr(value, "shape", None) == tokens.shape
        if value is not None and not (same and jnp.issubdtype(value.dtype, jnp.integer)):
            raise ValueError(
                f"got {name} {_kind(value)}, expected an integer array {tokens.shape}, as tokens"
            )


def check_cache(config: ModelConfig, cache: Any, batch: int) -> None:
    """Raises ValueError unless a cache has the model's layers and kind, and `batch` sequences."""
    layers = len(cache) if hasattr(cache, "__len__") else None
    if layers != config.num_layers:
        kind = f"{layers} layers" if layers else type(cache).__name__
        raise ValueError(
            f"got a cache of {kind}, expected {config.num_layers}: use model.init_cache or "
            "kvjax.prefill"
        )
    if isinstance(
        cache[0], DenseCache if config.layers[0].attention.shared_latent else LatentCache
    ):
        raise ValueError(
            f"got a {type(cache[0]).__name__}, which is of another model: use model.init_cache or "
            "kvjax.prefill"
        )
    if (held := len(cache[0].lengths)) != batch:
        raise ValueError(f"got a cache for {held} sequences, expected {batch}, as tokens")


def check_room(cache: Any, positions: jax.Array) -> None:
    """Outside jit: raises ValueError if the new tokens do not fit into the cache."""
    entry = cache[0]
    if isinstance(positions, Tracer) or isinstance(entry.lengths, Tracer):
        return
    needed = np.asarray(entry.lengths) + (np.asarray(positions) >= 0).sum(axis=1)
    capacity = np.broadcast_to(np.asarray(entry.capacity), needed.shape)
    if (needed > capacity).any():
        worst = np.argmax(needed - capacity)
        raise ValueError(
            f"the cache has room for {capacity[worst]} tokens per sequence, got {needed[worst]}"
        )


def _kind(value: Any) -> str:
    """An array's dtype and shape, or the type of anything else."""
    return f"{value.dtype} {value.shape}" if hasattr(value, "dtype") else type(value).__name__
