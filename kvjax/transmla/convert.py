"""`kvjax.transmla.convert`: one entry for all conversions."""

from __future__ import annotations

from typing import Any

from kvjax.checks import CONVERTED, check_finite, check_params
from kvjax.mesh import automatic_axes, on_automatic_mesh
from kvjax.nn import Transformer
from kvjax.sharding import mesh_of, place_params
from kvjax.transmla.decoupled import decoupled
from kvjax.transmla.equal_cache import equal_cache

METHODS = {"equal_cache": equal_cache, "decoupled": decoupled}


@automatic_axes()
def convert(
    model: Transformer, params: dict[str, Any], method: str = "equal_cache", **options: Any
) -> tuple[Transformer, dict[str, Any]]:
    """Converts a GQA model to latent attention (TransMLA, arXiv 2502.07864).

    >>> mla_model, mla_params = convert(model, params, method="equal_cache", init="svd_global")

    Args:
        method: "equal_cache": the cache keeps its size, see `kvjax.transmla.equal_cache`;
            "decoupled": a smaller cache, see `kvjax.transmla.decoupled`.
        params: of `model`; where they lie on a mesh, the result lies on it too.
        options: of the method.

    Raises:
        ValueError: an unknown method, a model or options that it refuses, or weights that hold
            NaN, before or after.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is none of {', '.join(METHODS)}")
    params = on_automatic_mesh(params)
    check_params(params)
    new_model, new_params = METHODS[method](model, params, **options)
    for index in range(model.config.num_layers):
        check_finite(new_params[f"layers_{index}"]["attn"], f"layers_{index}/attn/", CONVERTED)
    return new_model, place_params(new_model, new_params, mesh_of(params))
