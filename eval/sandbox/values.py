"""Values that an answer and its test exchange, as JSON: only plain ones, and built anew.

The two run in different processes. `encode` gives the JSON form of a value, `decode` builds a value
from that form, of types that this file names. So no method of the answer's classes ever runs in
the test's process: an object whose `__eq__` is always true arrives as the number or list that it
holds, or as an object that cannot be compared.

A value of a subclass of a built-in type (a named tuple, an IntEnum) counts as the value of that
type. `Counter`, `OrderedDict` and `deque` stay what they are, and a `defaultdict` becomes a dict.
Iterators, functions and instances of other classes have no plain form, see `Remote`.
"""

from __future__ import annotations

import collections
import datetime
import decimal
import fractions
import json
from collections.abc import Callable
from typing import Any

LONGEST = 1 << 24
"""Bytes of one message."""
SAFE = 1 << 53
"""Whole numbers up to this size are JSON's own; longer ones are hexadecimal, which has no limit of
digits in Python."""

Form = Any
"""What `json.loads` gives: None, bool, int, float, str, a list, or a dict with one tag."""


def message(form: Form) -> bytes:
    """One line of JSON.

    Raises:
        ValueError: the line is too long.
    """
    text = json.dumps(form, separators=(",", ":")).encode() + b"\n"
    if len(text) > LONGEST:
        raise ValueError(f"a value of {len(text)} bytes, expected at most {LONGEST}")
    return text


def encode(value: Any, keep: Callable[[Any], Form]) -> Form:
    """The JSON form of a value.

    Args:
        keep: the form of an object that has no plain one.

    Raises:
        RecursionError: a value that is nested too deeply, or contains itself.
    """
    if value is None or value is True or value is False:
        return value
    for kind, form in _FORMS.items():
        if isinstance(value, kind):
            return form(value, lambda part: encode(part, keep))
    if any(value is kind for kind in TYPES.values()):
        return {"type": value.__name__}
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        return encode(value.item(), keep)
    return keep(value)


def decode(form: Form, find: Callable[[Form], Any]) -> Any:
    """The value of a JSON form.

    Args:
        find: what stands for a form that `keep` made: the content of the tag "object".

    Raises:
        ValueError, TypeError, KeyError, ArithmeticError, RecursionError: no form of a value.
    """
    if form is None or isinstance(form, bool | int | float | str):
        return form
    if isinstance(form, list):
        return [decode(part, find) for part in form]
    ((tag, content),) = form.items()
    if tag == "object":
        return find(content)
    return _VALUES[tag](content, lambda part: decode(part, find))


Part = Callable[[Any], Any]


def _int(value: int, part: Part) -> Form:
    number = int.__index__(value)
    return number if -SAFE < number < SAFE else {"int": hex(number)}


def _pairs(value: dict, part: Part) -> Form:
    # dict's own methods: a subclass may have replaced them.
    return [[part(key), part(item)] for key, item in dict.items(value)]


def _tagged(tag: str, content: Callable[[Any, Part], Form]) -> Callable[[Any, Part], Form]:
    return lambda value, part: {tag: content(value, part)}


def _listed(tag: str, parts: Callable[[Any], Any]) -> Callable[[Any, Part], Form]:
    return lambda value, part: {tag: [part(item) for item in parts(value)]}


def _fields(*names: str) -> Callable[[Any, Part], Form]:
    return lambda value, part: [getattr(value, name) for name in names]


TYPES = {
    kind.__name__: kind
    for kind in (bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict, object)
}
"""Types that are values themselves: a test may ask for all whole numbers of a list."""

DATE = ("year", "month", "day")
TIME = ("hour", "minute", "second", "microsecond")

_FORMS: dict[type, Callable[[Any, Part], Form]] = {
    int: _int,
    float: lambda value, part: float.__float__(value),
    str: lambda value, part: str.__str__(value),
    complex: lambda value, part: {"complex": [value.real, value.imag]},
    bytes: lambda value, part: {"bytes": bytes.hex(value)},
    bytearray: lambda value, part: {"bytearray": bytearray.hex(value)},
    list: lambda value, part: [part(item) for item in list.__iter__(value)],
    tuple: _listed("tuple", tuple.__iter__),
    set: _listed("set", set.__iter__),
    frozenset: _listed("frozenset", frozenset.__iter__),
    collections.deque: _listed("deque", collections.deque.__iter__),
    collections.Counter: _tagged("Counter", _pairs),
    collections.OrderedDict: _tagged("OrderedDict", _pairs),
    dict: _tagged("dict", _pairs),
    type({}.keys()): _listed("keys", iter),
    type({}.values()): _listed("values", iter),
    type({}.items()): _tagged("items", lambda value, part: [[part(k), part(v)] for k, v in value]),
    range: _tagged("range", lambda value, part: [part(x) for x in _bounds(value)]),
    fractions.Fraction: _listed("Fraction", lambda value: (value.numerator, value.denominator)),
    decimal.Decimal: lambda value, part: {"Decimal": decimal.Decimal.__str__(value)},
    datetime.timedelta: _tagged("timedelta", _fields("days", "seconds", "microseconds")),
    datetime.datetime: lambda value, part: {"datetime": _naive(value, *DATE, *TIME)},
    datetime.date: _tagged("date", _fields(*DATE)),
    datetime.time: lambda value, part: {"time": _naive(value, *TIME)},
}
"""Type → the form of its values, subclasses before their bases."""


def _bounds(value: range) -> tuple[int, int, int]:
    return value.start, value.stop, value.step


def _naive(value: Any, *names: str) -> Form:
    if value.tzinfo is not None:
        raise ValueError(f"a {type(value).__name__} with a time zone, expected one without")
    return [getattr(value, name) for name in names]


def _parts(make: Callable[[Any], Any]) -> Callable[[Any, Part], Any]:
    return lambda content, part: make([part(item) for item in _a(list, content)])


def _mapping(make: Callable[[dict], Any]) -> Callable[[Any, Part], Any]:
    return lambda content, part: make(
        {part(key): part(item) for key, item in map(_pair, _a(list, content))}
    )


def _numbers(make: Callable[..., Any]) -> Callable[[Any, Part], Any]:
    return lambda content, part: make(*(_a(int, part(item)) for item in _a(list, content)))


def _a(kind: type, content: Any) -> Any:
    if type(content) is not kind:
        raise TypeError(f"a {type(content).__name__}, expected {kind.__name__}")
    return content


def _pair(content: Any) -> list[Any]:
    first, second = _a(list, content)
    return [first, second]


def _complex(content: Any, part: Part) -> complex:
    real, imaginary = _a(list, content)
    return complex(_a(float, real), _a(float, imaginary))


_VALUES: dict[str, Callable[[Any, Part], Any]] = {
    "type": lambda content, part: TYPES[_a(str, content)],
    "int": lambda content, part: int(_a(str, content), 16),
    "complex": _complex,
    "bytes": lambda content, part: bytes.fromhex(_a(str, content)),
    "bytearray": lambda content, part: bytearray.fromhex(_a(str, content)),
    "tuple": _parts(tuple),
    "set": _parts(set),
    "frozenset": _parts(frozenset),
    "deque": _parts(collections.deque),
    "dict": _mapping(dict),
    "Counter": _mapping(collections.Counter),
    "OrderedDict": _mapping(collections.OrderedDict),
    "keys": _parts(lambda parts: dict.fromkeys(parts).keys()),
    "values": _parts(lambda parts: dict(enumerate(parts)).values()),
    "items": _mapping(lambda pairs: pairs.items()),
    "range": _numbers(range),
    "Fraction": _numbers(fractions.Fraction),
    "Decimal": lambda content, part: decimal.Decimal(_a(str, content)),
    "timedelta": _numbers(lambda d, s, us: datetime.timedelta(d, s, us)),
    "datetime": _numbers(datetime.datetime),
    "date": _numbers(datetime.date),
    "time": _numbers(datetime.time),
}
"""Tag → the value that its content stands for."""


def refresh(old: Any, new: Any) -> Any:
    """Makes `old` equal to `new` in place where it can be changed, and returns the value to use.

    So a test sees what a function did to its arguments, though the function got copies.
    """
    if type(old) is not type(new):
        return new
    if isinstance(old, list | collections.deque):
        parts = [refresh(a, b) for a, b in zip(old, new, strict=False)]
        parts += list(new)[len(parts) :]
        old.clear()
        old.extend(parts)
        return old
    if isinstance(old, dict):
        items = {key: refresh(old[key], v) if key in old else v for key, v in new.items()}
        old.clear()
        dict.update(old, items)
        return old
    if isinstance(old, set):
        old.clear()
        old.update(new)
        return old
    if isinstance(old, bytearray):
        old[:] = new
        return old
    if isinstance(old, tuple) and len(old) == len(new):
        parts = tuple(refresh(a, b) for a, b in zip(old, new, strict=True))
        return old if all(a is b for a, b in zip(old, parts, strict=True)) else parts
    return new
