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
from kvjax.transmla.streams import REPLAY

METHODS = ("equal_cache", "decoupled")


def convert(
    model: Transformer, params: Mapping[str, Any], method: str = "equal_cache", **options: Any
) -> tuple[Transformer, dict[str, Any]]:
    """Calls `to_equal_cache` or `to_decoupled` by the name of the method.

    Examples:
        >>> mla_model, mla_params = kvjax.transmla.convert(model, params, "equal_cache")

    Args:
        options: the keyword arguments of that function, and for "decoupled" either
            `calibration`, int32 [S, T] token ids without padding, or `stats` from `calibrate`.

    Raises:
        ValueError: an unknown method, and see the function.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")
    if method == "equal_cache":
        return to_equal_cache(model, params, **options)
    text, stats = options.pop("calibration", None), options.pop("stats", None)
    if (text is None) == (stats is None):
        raise ValueError(
            "method 'decoupled' needs either calibration=token ids [S, T] or "
            "stats=transmla.calibrate(model, params, …)"
        )
    if stats is None:
        batches = [text[i : i + REPLAY] for i in range(0, len(text), REPLAY)]
        stats = calibrate(model, params, batches, input_moments=options.get("q_rank") is not None)
    return to_decoupled(model, params, stats, **options)


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
