"""Head ablation: the parameters of a model in which chosen heads contribute nothing.

Importance says how much a head looks at an answer's source. Ablation says whether the model needs
the head: `without_heads` silences it, and any function of kvjax then measures what is left. It
changes parameters, not the model, so it works with generation, scores, caches and conversions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


def without_heads(params: Mapping[str, Any], heads: Iterable[tuple[int, int]]) -> dict[str, Any]:
    """The parameters with the outputs of some query heads set to zero.

    A layer adds up its heads' outputs through `o` [N, H, D]: the rows of a silenced head become
    zero. Its keys and values stay, because other query heads of its group may share them. A bias
    `o_bias` stays too. In a converted model it holds the mean output of all heads, so ablate before
    converting. The other arrays are shared with `params`, and everything stays on its devices.

    Examples:
        >>> fewer = kvjax.headkv.without_heads(params, [(0, 0), (0, 1)])  # two heads of layer 0
        >>> logits, _ = model.apply({"params": fewer}, tokens)

    Args:
        params: parameters of any model; each layer has an `attn/o` [N, H, D].
        heads: (layer, query head) pairs, such as `kvjax.headkv.HeadScores.ranked[:4]`.

    Returns:
        A new tree; `params` is unchanged.

    Raises:
        ValueError: a head that the model does not have.
    """
    chosen: dict[int, list[int]] = {}
    for pair in heads:
        if np.shape(pair) != (2,):
            raise ValueError(f"got head {pair!r}, expected pairs (layer, query head)")
        chosen.setdefault(int(pair[0]), []).append(int(pair[1]))
    layers = sum(name.startswith("layers_") for name in params)
    new = dict(params)
    for layer, numbers in chosen.items():
        if not 0 <= layer < layers:
            raise ValueError(f"got head {layer}-{numbers[0]}, expected layers 0 to {layers - 1}")
        own = params[f"layers_{layer}"]
        o = own["attn"]["o"]
        for head in numbers:
            if not 0 <= head < len(o):
                raise ValueError(f"got head {layer}-{head}, expected heads 0 to {len(o) - 1}")
        kept = np.isin(np.arange(len(o)), numbers, invert=True)
        new[f"layers_{layer}"] = {**own, "attn": {**own["attn"], "o": _zeroed(o, kept)}}
    return new


@jax.jit
def _zeroed(o: Float[Array, "N H D"], kept: Bool[Array, " N"]) -> Float[Array, "N H D"]:
    return jnp.where(kept[:, None, None], o, jnp.zeros((), o.dtype))
