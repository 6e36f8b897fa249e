"""Arrays without NaN and infinity: what a model is read from, and what is written, is checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def first_not_finite(tree: Any, prefix: str = "") -> str | None:
    """The name of the first array that holds NaN or infinity; None where all are finite.

    Args:
        tree: arrays of any kind, on any devices; integers are not looked at.
        prefix: what stands before the names, such as "layers_0/".
    """
    found = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    on_host = all(isinstance(leaf, np.ndarray) for _, leaf in found)
    leaves = [leaf for _, leaf in found]
    finite = [np.isfinite(leaf).all() for leaf in leaves] if on_host else _all_finite(leaves)
    broken = [name for (name, _), good in zip(found, finite, strict=True) if not bool(good)]
    return f"{prefix}{broken[0]}".rstrip("/") if broken else None


def check_finite(tree: Any, prefix: str = "", reason: str = "") -> None:
    """Refuses arrays that hold NaN or infinity.

    Args:
        tree, prefix: see `first_not_finite`.
        reason: what it may come from, the end of the sentence.

    Raises:
        ValueError: names the first of these arrays.
    """
    name = first_not_finite(tree, prefix)
    if name is not None:
        raise ValueError(f"{name} has NaN or infinite values, expected finite ones{reason}")


def check_params(params: Mapping[str, Any]) -> None:
    """`check_finite` of a model's parameters, one part after the other: parts may be read lazily.

    Raises:
        ValueError: names the first parameter that holds NaN or infinity.
    """
    for name in params:
        check_finite({name: params[name]})


def rounded(x: np.ndarray, dtype: Any) -> jax.Array:
    """An array in a smaller dtype; what overflows is infinite, without numpy's warning."""
    with np.errstate(over="ignore"):
        return jnp.asarray(x.astype(dtype))


CONVERTED = " after the conversion: it overflows the dtype, or its fits diverge"
OVERFLOW = "the weights hold NaN, or the activations overflow: float16 ends at 65504"
"""What logits that are not finite come from."""


@jax.jit
def _all_finite(leaves: Sequence[jax.Array]) -> list[jax.Array]:
    return [jnp.isfinite(leaf).all() for leaf in leaves]
