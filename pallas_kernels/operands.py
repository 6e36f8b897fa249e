"""What a kernel reads: entries taken apart into arrays."""

from typing import Any, NamedTuple

from pallas_kernels.quantized import Quantized


class Operands(NamedTuple):
    """What a kernel reads: arrays outside of it, refs inside.

    Attributes:
        queries: a tuple of arrays [·, X], whose logits with the keys are summed.
        keys: a tuple of arrays [·, rows, X], one for each of the queries.
        values: [·, rows, Y]; None: the first of the keys.
        key_scales: a tuple of [·, rows] fp32, or of None for keys that are not quantized.
        value_scale: as one of them; None too where the values are keys.
        seen: [·, rows] fp32, 0 where a row is not to be seen; None for all.
    """

    queries: Any
    keys: Any
    values: Any
    key_scales: Any
    value_scale: Any
    seen: Any

    @property
    def weighed(self) -> Any:
        """The values, whichever array they are."""
        return self.keys[0] if self.values is None else self.values

    @property
    def weighed_scale(self) -> Any:
        """Their scales, None where they are not quantized."""
        return self.key_scales[0] if self.values is None else self.value_scale


def operands(
    queries: tuple[Any, ...], keys: tuple[Any, ...], values: Any, seen: Any = None
) -> Operands:
    """Values and scales of the entries, which are arrays or, for limits, shapes of them."""
    return Operands(
        queries,
        tuple(_split(x)[0] for x in keys),
        None if values is None else _split(values)[0],
        tuple(_split(x)[1] for x in keys),
        None if values is None else _split(values)[1],
        seen,
    )


def _split(entries: Any) -> tuple[Any, Any]:
    if isinstance(entries, Quantized):
        return entries.values, entries.scale
    return entries, None
