"""TransMLA: converts the weights of grouped-query models to multi-head latent attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvjax.nn import Transformer
from kvjax.transmla.allocation import allocate_sizes, choose_fold, choose_rope_dim
from kvjax.transmla.calibration import LayerStats, Stats, calibrate
from kvjax.transmla.closed_form import BEST, UNBIASED, Recipe, published
from kvjax.transmla.decoupled import to_decoupled
from kvjax.transmla.distill import distill
from kvjax.transmla.equal_cache import to_equal_cache
from kvjax.transmla.inits import INITS, Factors, Init, balanced_svd

METHODS = ("equal_cache", "decoupled")


def convert(
    model: Transformer, params: Mapping[str, Any], method: str = "equal_cache", **options: Any
) -> tuple[Transformer, dict[str, Any]]:
    """Calls `to_equal_cache` or `to_decoupled` by the name of the method.

    Args:
        options: the keyword arguments of that function, and `stats` for "decoupled".

    Raises:
        ValueError: an unknown method, and see the function.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")
    if method == "equal_cache":
        return to_equal_cache(model, params, **options)
    if options.get("stats") is None:
        raise ValueError("method 'decoupled' needs stats=transmla.calibrate(model, params, …)")
    return to_decoupled(model, params, **options)


__all__ = [
    "BEST",
    "INITS",
    "METHODS",
    "UNBIASED",
    "Factors",
    "Init",
    "LayerStats",
    "Recipe",
    "Stats",
    "allocate_sizes",
    "balanced_svd",
    "calibrate",
    "choose_fold",
    "choose_rope_dim",
    "convert",
    "distill",
    "published",
    "to_decoupled",
    "to_equal_cache",
]
