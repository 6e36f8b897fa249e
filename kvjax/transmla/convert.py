"""`kvjax.transmla.convert`: one entry for all conversions."""

from __future__ import annotations

from typing import Any

from kvjax.nn import Transformer
from kvjax.transmla.equal_cache import equal_cache


def decoupled(model: Transformer, params: dict[str, Any], **options: Any):
    """TransMLA v3 to v5: a smaller cache, DeepSeek-shaped."""
    raise NotImplementedError("method 'decoupled' is not built yet; 'equal_cache' is")


METHODS = {"equal_cache": equal_cache, "decoupled": decoupled}


def convert(
    model: Transformer, params: dict[str, Any], method: str = "equal_cache", **options: Any
) -> tuple[Transformer, dict[str, Any]]:
    """Converts a GQA model to latent attention (TransMLA, arXiv 2502.07864).

    >>> mla_model, mla_params = convert(model, params, method="equal_cache", init="svd_global")

    Args:
        method: "equal_cache": the cache keeps its size, see `kvjax.transmla.equal_cache`.
        options: of the method.

    Raises:
        ValueError: an unknown method, or a model or options that it refuses.
        NotImplementedError: method "decoupled".
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is none of {', '.join(METHODS)}")
    return METHODS[method](model, params, **options)
