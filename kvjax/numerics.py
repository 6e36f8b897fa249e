"""Numbers that are not finite: no answer is made of them, and the error says where they arose.

In float16 a residual stream above 65504 overflows to infinity and becomes NaN one norm later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from kvjax.cache import NoCache
from kvjax.finite import first_not_finite
from kvjax.nn import Transformer

Ids = Sequence[int] | np.ndarray


def not_finite(what: str, model: Transformer, params: Any, tokens: Ids) -> ValueError:
    """The error for results that are NaN or infinite.

    Args:
        what: the result, as the subject of a sentence in the plural: "the logits of prompt 3".
        tokens: ids that the model reads again, layer by layer, to find where it happened.
    """
    return ValueError(f"{what} are not finite: {explain(model, params, tokens)}")


def explain(model: Transformer, params: Any, tokens: Ids) -> str:
    """Names the first weights, or else the first layer, whose numbers are not finite."""
    dtype = params["embedding"].dtype.name
    advice = "; load the model as bfloat16 or float32" if dtype == "float16" else ""
    for name in params:
        broken = first_not_finite(params[name], f"{name}/")
        if broken is not None:
            return f"{broken} has NaN or infinity in {dtype}{advice}"
    ids = jnp.asarray(np.asarray(tokens, np.int32)[None])
    positions = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
    lengths = jnp.full((1,), ids.shape[1], jnp.int32)
    x: Any = model.apply({"params": params}, ids, method="embed")
    for index, layer in enumerate(model.config.layers):
        args = (index, x, positions, NoCache(), lengths)
        x = model.apply({"params": params}, *args, method="layer")[0]
        if first_not_finite(x) is not None:
            kind = type(layer.attention).__name__.removesuffix("Config")
            return f"{dtype} overflows in layer {index} ({kind}){advice}"
    return f"{dtype} overflows in the output logits, or in what was decoded{advice}"
