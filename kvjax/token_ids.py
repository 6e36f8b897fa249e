"""Token ids that come from files and callers: whole numbers of a vocabulary.

A device clamps an id that an embedding has no row for, and gives the last token's row: the ids
are checked on the host, before they are cast to int32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Int32


def token_ids(values: Any, vocab_size: int, name: str) -> Int32[np.ndarray, "*shape"]:
    """The ids as int32, of the shape that they came in.

    Args:
        values: an array, or lists of equal lengths.
        vocab_size: V; ids are 0 to V − 1.
        name: of what holds them, the start of an error.

    Raises:
        ValueError: no ids, numbers that are not of an integer dtype, or ids that the vocabulary
            does not have.
    """
    try:
        ids = np.asarray(values)
    except (ValueError, OverflowError):
        raise ValueError(f"{name}: got ids of no one shape, expected an array of them") from None
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{name}: got {ids.dtype} {ids.shape}, expected token ids, integers")
    if ids.size == 0:
        raise ValueError(f"{name}: got no token ids, shape {ids.shape}, expected at least one")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(
            f"{name}: got token ids from {ids.min()} to {ids.max()}, expected 0 to "
            f"{vocab_size - 1}, the model's vocabulary"
        )
    return ids.astype(np.int32)
