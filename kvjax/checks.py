"""Checks of what comes in: numbers of settings, prompts and token ids, and arrays without NaN."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32


@dataclass(frozen=True)
class Range:
    """The finite numbers between two bounds. True and False do not count as numbers.

    In `Annotated[int, Range(…)]` it is a type of a field, see `kvjax.fields`.

    Attributes:
        least, most: inclusive bounds.
        above, below: exclusive bounds.
        whole: integers only.
        optional: None is allowed too.
    """

    least: int | float = -math.inf
    most: int | float = math.inf
    above: int | float = -math.inf
    below: int | float = math.inf
    whole: bool = False
    optional: bool = False

    def holds(self, value: Any) -> bool:
        """Whether `value` is such a number.

        Devices compute in float32: 1 − 1e-9 rounds to 1 and is not below 1; 1e39 is infinite.
        """
        if value is None:
            return self.optional
        number = _integer(value) if self.whole else _float32(value)
        if number is None or (isinstance(number, float) and not math.isfinite(number)):
            return False
        return self.least <= number <= self.most and self.above < number < self.below

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(self._validated)

    def _validated(self, value: Any) -> Any:
        from pydantic_core import PydanticCustomError

        if not self.holds(value):
            raise PydanticCustomError("range", "out of range")
        return value

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a finite number"
        if math.isfinite(self.least) and math.isfinite(self.most):
            return f"{kind} from {self.least} to {self.most}"
        named = (
            ("of at least", self.least),
            ("above", self.above),
            ("of at most", self.most),
            ("below", self.below),
        )
        bounds = [f"{name} {bound}" for name, bound in named if math.isfinite(bound)]
        return f"{kind} {' and '.join(bounds)}" if bounds else kind


COUNT = Range(least=1, most=2**31 - 1, whole=True)
"""Counts of at least one."""
SIZE = Range(least=0, most=2**31 - 1, whole=True)
"""Counts of at least zero."""
SEED = Range(least=0, most=2**63 - 1, whole=True)
POSITIVE = Range(above=0)
NOT_NEGATIVE = Range(least=0)
SHARE = Range(least=0, most=1)


def optional(allowed: Range) -> Range:
    """The same numbers, or None."""
    return Range(**{**vars(allowed), "optional": True})


def out_of_range(
    values: Mapping[str, Any], ranges: Mapping[str, Range], prefix: str = ""
) -> list[str]:
    """A sentence about each setting whose value is outside its range.

    Args:
        values: settings by name, such as `vars` of a dataclass. Only names in `ranges` are checked.
        prefix: put before each name in the sentences.
    """
    return [
        f"{prefix}{name} is {shown(values[name])}, expected {allowed}"
        for name, allowed in ranges.items()
        if not allowed.holds(values[name])
    ]


def check_ranges(values: Mapping[str, Any], ranges: Mapping[str, Range]) -> None:
    """Raises ValueError that names all settings out of their range; see `out_of_range`."""
    problems = out_of_range(values, ranges)
    if problems:
        raise ValueError("; ".join(problems))


def _integer(value: Any) -> int | None:
    if isinstance(value, bool | np.bool_):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _float32(value: Any) -> float | None:
    # Arrays of one number pass too: settings may come from numpy or jax.
    scalar = isinstance(value, numbers.Real) or getattr(value, "shape", None) == ()
    if not scalar or isinstance(value, bool | np.bool_):
        return None
    try:
        with np.errstate(over="ignore"):
            return float(np.float32(float(value)))
    except (TypeError, ValueError, OverflowError):
        return None


def shown(value: Any, width: int = 60) -> str:
    """A value as one line of an error, shortened; with a hint where float32 rounds it."""
    text = " ".join(repr(value).split())
    number = _float32(value) if isinstance(value, float) else None
    if number in (0.0, 1.0, math.inf, -math.inf) and number != value:
        return f"{text} ({number} in float32)"
    return text if len(text) <= width else f"{text[:width]}…"


def float_dtype(dtype: Any) -> np.dtype:
    """The dtype of a name such as "bfloat16".

    Raises:
        ValueError: no such dtype, or none of floating point.
    """
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if dtype is None or found is None or not jnp.issubdtype(found, jnp.floating):
        raise ValueError(f"dtype is {dtype!r}, expected one like bfloat16, float16 or float32")
    return found


LISTS = "a list of lists of token ids"
PROMPT = "a list of token ids (prompts are a list of such lists)"


def token_ids(
    values: Any, vocab_size: int, name: str, expected: str = "an array of token ids"
) -> Int32[np.ndarray, "*shape"]:
    """Checked token ids as int32, in the shape of `values`.

    Args:
        values: an array, or lists of equal lengths.
        vocab_size: V; ids are 0 to V − 1.
        name: where the ids come from, such as "calibration"; starts the error.
        expected: what `values` should be; ends the error.

    Raises:
        ValueError: there are no ids, one is not a whole number, or one is outside the vocabulary.
    """
    ids = _whole_numbers(values, name, expected)
    if not ids.size:
        raise ValueError(f"{name} is empty, expected at least one token")
    # A device clamps an id without an embedding row to the last row and raises nothing, so the ids
    # are checked on the host, before the cast to int32 can wrap them.
    low, high = ids.min(), ids.max()
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"{name} has token {low if low < 0 else high}, expected ids of 0 to {vocab_size - 1}"
        )
    return ids.astype(np.int32)


def check_prompts(
    prompts: Any, max_new_tokens: Any, vocab_size: int, context_length: int, before: int = 0
) -> None:
    """Refuses prompts that a model cannot continue.

    Args:
        prompts: lists of token ids.
        max_new_tokens: number of tokens that are to follow each prompt.
        vocab_size: V; ids are 0 to V − 1.
        context_length: number of tokens that the model can read.
        before: number of context tokens that precede every prompt.

    Raises:
        ValueError: names the first bad prompt, and the fault.
    """
    new = _integer(max_new_tokens)
    if new is None or new < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens!r}, expected a whole number ≥ 1")
    for index in range(_prompt_count(prompts)):
        name = f"prompt {index}"
        ids = token_ids(prompts[index], vocab_size, name, PROMPT)
        _check_flat(ids, name, PROMPT)
        if before + ids.size + new > context_length:
            raise ValueError(
                f"{name} has {ids.size} tokens and max_new_tokens is {new}, "
                f"expected at most {context_length} in all: the model's context"
            )


def eos_array(eos_ids: Any, default: Sequence[int]) -> Int32[np.ndarray, " E"]:
    """The ids that end a sequence: one id or several, or the default for None.

    Raises:
        ValueError: another value.
    """
    if eos_ids is None:
        eos_ids = default
    elif isinstance(eos_ids, Set):
        eos_ids = sorted(eos_ids)
    elif isinstance(eos_ids, numbers.Integral) or getattr(eos_ids, "ndim", 1) == 0:
        eos_ids = [eos_ids]
    expected = "None, () or a list of token ids"
    ids = _whole_numbers(eos_ids, "eos_ids", expected)
    _check_flat(ids, "eos_ids", expected)
    if ids.size and not -(2**31) <= ids.min() <= ids.max() < 2**31:
        raise ValueError(f"eos_ids are {eos_ids}, expected token ids of the model")
    return ids.astype(np.int32)


def _prompt_count(prompts: Any) -> int:
    """The number of prompts."""
    _refuse_text(prompts, "prompts", LISTS)
    try:
        count = len(prompts)
    except TypeError:
        count = None
    if count is None or not hasattr(prompts, "__getitem__"):
        raise ValueError(f"prompts: got {_kind(prompts)}, expected {LISTS}")
    if not count:
        raise ValueError("got no prompts, expected at least one")
    return count


def _whole_numbers(value: Any, name: str, expected: str) -> np.ndarray:
    """An array of integers, of any width that NumPy has or of Python's; int32 where it is empty.

    Raises:
        ValueError: a single value, a text, lists of different lengths, or other numbers.
    """
    _refuse_text(value, name, expected)
    try:
        ids = np.asarray(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{name}: got lists of different lengths, expected {expected}") from None
    except TypeError:
        raise ValueError(f"{name}: got {_kind(value)}, expected {expected}") from None
    if ids.ndim == 0:
        raise ValueError(f"{name}: got {_kind(value)}, expected {expected}")
    if not ids.size:
        return ids.astype(np.int32)
    # NumPy gives object or float arrays for mixed lists: accept those of exact ints only.
    if ids.dtype.kind not in "iu" and not all(type(i) is int for i in ids.flat):
        odd = next(i for i in ids.ravel().tolist() if type(i) is not int)
        raise ValueError(f"{name}: got {_kind(odd)} among the token ids, expected {expected}")
    return ids


def _check_flat(ids: np.ndarray, name: str, expected: str) -> None:
    """Raises ValueError for more than one axis."""
    if ids.ndim != 1:
        raise ValueError(f"{name}: got ids of shape {ids.shape}, expected {expected}")


def _refuse_text(value: Any, name: str, expected: str) -> None:
    """Raises ValueError for the two usual mistakes, and says what to pass instead."""
    if isinstance(value, str | bytes):
        raise ValueError(
            f"{name}: got text, expected {expected}: encode it with kvjax.load_tokenizer"
        )
    if isinstance(value, Mapping):
        raise ValueError(
            f"{name}: got {type(value).__name__}, expected {expected}: "
            "pass tokenizer(...)['input_ids']"
        )


def _kind(value: Any) -> str:
    """Describes a value in one line, for an error message."""
    if value is None or isinstance(value, numbers.Number):
        return str(value)
    return "text" if isinstance(value, str | bytes) else type(value).__name__


def first_not_finite(tree: Any, prefix: str = "") -> str | None:
    """The name of the first array that holds NaN or infinity; None where all are finite.

    Args:
        tree: arrays on the host or on devices. Integer arrays are skipped.
        prefix: put before the name, such as "layers_0/".
    """
    found = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    # numpy for arrays in host memory, which may be memory-mapped: no program of jax is compiled.
    # One jitted call where an array is on an accelerator or on several devices.
    leaves = [leaf for _, leaf in found]
    if all(map(_in_host_memory, leaves)):
        finite = [np.isfinite(_on_host(leaf)).all() for leaf in leaves]
    else:
        finite = _all_finite(leaves)
    broken = [name for (name, _), good in zip(found, finite, strict=True) if not bool(good)]
    return f"{prefix}{broken[0]}".rstrip("/") if broken else None


def check_finite(tree: Any, prefix: str = "", reason: str = "") -> None:
    """Refuses arrays that hold NaN or infinity.

    Args:
        tree, prefix: see `first_not_finite`.
        reason: a likely cause, appended to the error.

    Raises:
        ValueError: names the first of these arrays.
    """
    name = first_not_finite(tree, prefix)
    if name is not None:
        raise ValueError(f"{name} has NaN or infinite values, expected finite ones{reason}")


def check_params(params: Mapping[str, Any]) -> None:
    """`check_finite` of a model's parameters, part by part, because parts may be read lazily.

    Raises:
        ValueError: names the first parameter that holds NaN or infinity.
    """
    for name in params:
        check_finite({name: params[name]})


def rounded(x: np.ndarray, dtype: Any) -> jax.Array:
    """An array cast to a smaller dtype. Overflow gives infinity, without numpy's warning."""
    with np.errstate(over="ignore"):
        return jnp.asarray(x.astype(dtype))


CONVERTED = " after the conversion: it overflows the dtype, or its fits diverge"
OVERFLOW = "the weights hold NaN, or the activations overflow: float16 ends at 65504"
"""The usual cause of logits that are not finite."""


def _in_host_memory(leaf: Any) -> bool:
    if not isinstance(leaf, jax.Array):
        return True
    return leaf.is_fully_addressable and [d.platform for d in leaf.devices()] == ["cpu"]


def _on_host(leaf: Any) -> np.ndarray:
    # A jax array keeps the numpy array that was made of it, and then cannot be donated in place.
    # The array of its shard keeps this one instead.
    return np.asarray(leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf)


@jax.jit
def _all_finite(leaves: Sequence[jax.Array]) -> list[jax.Array]:
    return [jnp.isfinite(leaf).all() for leaf in leaves]
