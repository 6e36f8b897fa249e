"""Fields of files: each is declared once, as a type with a range, and pydantic checks the values.

A field's type is a Python type such as `Count`, `list[Text]` or `Positive | None`. A table of types
by name declares a JSON object of which only some fields are read; a dataclass declares one whose
other fields are refused. Values are taken as they are: no text becomes a number, and true is none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from annotated_types import Len

from kvjax.checks import COUNT, NOT_NEGATIVE, POSITIVE, SEED, SHARE, SIZE, Range, shown

Kind = Any
"""A field's type: what `typing.get_type_hints` gives. Python has no name for all such types."""

MOST = 10
"""Number of problems that one error shows."""
WIDTH = 1000
"""Number of signs of a line that it shows: names in files may be of any length."""


@dataclass(frozen=True)
class Says:
    """In `Annotated`: the words for a type in errors, where those of `words` are clumsy."""

    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class OneOf:
    """In `Annotated[str, …]`: a text that is one of these."""

    names: tuple[str, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.literal_schema(list(self.names))

    def __str__(self) -> str:
        return f"one of {', '.join(self.names)}"


Text = Annotated[str, Says("a text")]
Name = Annotated[str, Len(1), Says("a text that is not empty")]
Flag = Annotated[bool, Says("true or false")]
Object = Annotated[dict[str, Any], Says("an object")]
Count = Annotated[int, COUNT]
Size = Annotated[int, SIZE]
Bytes = Annotated[int, Range(least=0, whole=True)]
Seed = Annotated[int, SEED]
Number = Annotated[float, Range()]
Positive = Annotated[float, POSITIVE]
NotNegative = Annotated[float, NOT_NEGATIVE]
Share = Annotated[float, SHARE]


def or_null(kind: Kind) -> Kind:
    """The type, or null: for tables, where type checkers take `Count | None` for arithmetic."""
    return kind | None


class Problems(ValueError):
    """All problems of a file or of settings, one a line; the first ten, then how many more."""

    def __init__(self, lines: Iterable[str]):
        one_line = (" ".join(line.split()) for line in lines)
        self.lines = tuple(f"{x[:WIDTH]}…" if len(x) > WIDTH else x for x in one_line)
        more = len(self.lines) - MOST
        shown = (*self.lines[:MOST], f"and {more} more problems") if more > 0 else self.lines
        super().__init__("\n".join(shown))


def refuse(lines: Iterable[str], where: str = "", hint: str = "") -> None:
    """Raises `Problems` if there are any.

    Args:
        where: file and place, put before each line with a colon.
        hint: put after each line.
    """
    found = [f"{where}{': ' if where else ''}{line}{hint}" for line in lines]
    if found:
        raise Problems(found)


@contextlib.contextmanager
def within(where: Any) -> Iterator[None]:
    """Puts a file's name before every line of a ValueError that the block raises."""
    try:
        yield
    except ValueError as error:
        lines = error.lines if isinstance(error, Problems) else [str(error)]
        raise Problems(f"{where}: {line}" for line in lines) from None


def violations(
    values: Mapping[str, Any], kinds: Mapping[str, Kind], at: str = "", required: bool = False
) -> Iterator[tuple[str, str]]:
    """Each field whose value is not of its type, with a line that says so.

    Args:
        values: fields by name; those without a type are not looked at.
        at: put before the name in the line, such as "model.".
        required: a missing field is a violation too.
    """
    for name, kind in kinds.items():
        if name not in values:
            if required:
                yield name, f"{at}{name} is missing, expected {words(kind)}"
        elif not fits(values[name], kind):
            place, value, kind = _misfit(values[name], kind)
            yield name, f"{at}{name}{place} is {shown(value)}, expected {words(kind)}"


def _misfit(value: Any, kind: Kind) -> tuple[str, Any, Kind]:
    """The place of the first wrong value inside of lists and objects, the value, and its type."""
    place = ""
    while isinstance(value, list | tuple | dict) and not _says(kind):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        inner = ((key, part, _inner(kind, key)) for key, part in parts)
        wrong = next((each for each in inner if each[2] and not fits(*each[1:])), None)
        if wrong is None:
            break
        key, value, kind = wrong
        place += f"[{key}]" if isinstance(key, int) else f".{key}"
    return place, value, kind


def _says(kind: Kind) -> bool:
    return typing.get_origin(kind) is Annotated and any(
        isinstance(each, Says) for each in typing.get_args(kind)[1:]
    )


def fits(value: Any, kind: Kind) -> bool:
    """Whether a value is of a type."""
    from pydantic import ValidationError

    try:
        _adapter(kind).validate_python(value, strict=True)
    except (ValidationError, RecursionError):
        return False
    return True


def object_problems(
    value: Any,
    kinds: Mapping[str, Kind],
    at: str = "",
    optional: Mapping[str, Kind] | None = None,
    others: bool = True,
) -> Iterator[str]:
    """A line for each problem of a JSON object that has a table of types.

    Args:
        kinds, optional: types of fields that must be there, and of those that may be.
        at: put before the names, such as "all.".
        others: whether the object may have fields without a type.
    """
    if not isinstance(value, Mapping):
        yield f"{at.rstrip('. ') or 'it'} is {shown(value)}, expected an object"
        return
    yield from (line for _, line in violations(value, kinds, at, required=True))
    yield from (line for _, line in violations(value, optional or {}, at))
    known = {**kinds, **(optional or {})}
    for name in () if others else sorted(value.keys() - known.keys()):
        yield f"{at}{name} is unknown, expected only {', '.join(known)}"


def check_fields(settings: Any) -> None:
    """Raises `Problems` that names all fields of a dataclass, at any depth, of another type."""
    refuse(field_problems(settings))


def field_problems(settings: Any, at: str = "") -> Iterator[str]:
    """A line for each field of a dataclass, and of those in it, that is not of its type."""
    for name, kind in hints(type(settings)).items():
        value = getattr(settings, name)
        if dataclasses.is_dataclass(value):
            yield from field_problems(value, f"{at}{name}.")
        elif value and isinstance(value, tuple) and all(map(dataclasses.is_dataclass, value)):
            for index, part in enumerate(value):
                yield from field_problems(part, f"{at}{name}[{index}].")
        else:
            # Settings read back from JSON have lists where tuples are declared.
            value = tuple(value) if isinstance(value, list) else value
            yield from (line for _, line in violations({name: value}, {name: kind}, at))


def build(kind: Kind, value: Any, where: str, others: bool = False) -> Any:
    """A dataclass from a JSON value; lists become tuples, and objects the dataclasses of fields.

    Args:
        where: file and place, for the error.
        others: fields that are not declared are ignored; otherwise they are refused.

    Raises:
        Problems: names all fields that are missing, unknown or of another type; or what the
            class's own `__post_init__` finds.
    """
    from pydantic import ValidationError

    try:
        # As JSON again: for pydantic, a list or an object of Python is no tuple and no dataclass.
        text, extra = json.dumps(value, default=str), "ignore" if others else "forbid"
        return _adapter(kind).validate_json(text, strict=True, extra=extra)
    except ValidationError as error:
        found = error.errors(include_url=False)
    # A union has an error for each of its types, at the same place.
    lines = dict.fromkeys(line for each in found for line in _lines(kind, value, each))
    raise Problems(f"{where}: {line}" for line in lines) from None


def _lines(kind: Kind, value: Any, error: Mapping[str, Any]) -> Sequence[str]:
    """What pydantic found at one place, in our words."""
    place, loc = "", error["loc"]
    if error["type"] == "missing" and isinstance(loc[-1], int):
        loc = loc[:-1]  # an entry that a list of fixed length lacks: the list is wrong
    for key in loc:
        inner = _inner(kind, key)
        if inner is None:  # a branch of a union, which the file does not have
            break
        kind, place = inner, f"{place}[{key}]" if isinstance(key, int) else f"{place}.{key}"
        value = value.get(key) if isinstance(value, dict) else value[key]
    place = place.removeprefix(".")
    if error["type"] == "json_invalid":  # YAML may nest deeper, and escape half of a character
        return [error["msg"]]
    if error["type"] == "unexpected_keyword_argument":
        there = f"{place} has" if place else "got"
        unknown = shown(error["loc"][-1])
        return [f"{there} an unknown field {unknown}, expected some of {', '.join(hints(kind))}"]
    if error["type"] == "value_error":  # of the class's own checks
        raised = error["ctx"]["error"]
        said = raised.lines if isinstance(raised, Problems) else [str(raised)]
        return [f"{place}.{line}" if place else line for line in said]
    if error["type"] == "too_short" and len(value) >= error["ctx"]["min_length"]:
        return []  # pydantic does not count entries that are wrong
    if error["type"] == "missing" and loc == error["loc"]:
        return [f"{place} is missing, expected {words(kind)}"]
    return [f"{place or 'it'} is {shown(value)}, expected {words(kind)}"]


def _inner(kind: Kind, key: Any) -> Kind | None:
    """The type of a part; None where `key` names no part, but a branch of pydantic's."""
    kind = plain(kind)
    if len(several := members(kind)) > 1:
        inner = (_inner(part, key) for part in several)
        return next((found for found in inner if found is not None), None)
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return hints(kind).get(key)
    if origin in (list, tuple) and isinstance(key, int):
        return parts[min(key, len(parts) - 1)] if parts[-1] is not ... else parts[0]
    if origin in (dict, Mapping) and isinstance(key, str):
        return parts[1]
    return None


@functools.cache
def hints(kind: type) -> dict[str, Kind]:
    """The types of a dataclass's fields, by name."""
    found = typing.get_type_hints(kind, include_extras=True)
    return {field.name: found[field.name] for field in dataclasses.fields(kind)}


@functools.cache
def _adapter(kind: Kind) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def members(kind: Kind) -> tuple[Kind, ...]:
    """The types of a union; a type that is none alone."""
    is_union = typing.get_origin(kind) in (Union, types.UnionType)
    return typing.get_args(kind) if is_union else (kind,)


def plain(kind: Kind) -> Kind:
    """The type without what `Annotated` says about it."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind


NAMES = {
    **{int: "a whole number", float: "a number", str: "a text", bool: "true or false"},
    **{types.NoneType: "null", dict: "an object", list: "a list", Path: "a path"},
}


def words(kind: Kind) -> str:
    """A type in the words of an error: "a whole number from 1 to 9 or null"."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        said = [str(each) for each in parts[1:] if isinstance(each, Says | OneOf | Range)]
        if said:
            return said[-1]
        least = [f"a list of at least {m.min_length}" for m in parts[1:] if isinstance(m, Len)]
        return words(parts[0]).replace("a list", "".join(least) or "a list", 1)
    if len(members(kind)) > 1:
        *first, last = map(words, parts)
        return f"{', '.join(first)} or {last}"
    if origin is Literal:
        return repr(parts[0]) if len(parts) == 1 else f"one of {', '.join(map(str, parts))}"
    if origin in (list, tuple):
        many = f" of {len(parts)}" if origin is tuple and ... not in parts else ""
        return f"a list{many}, each {words(parts[0])}"
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return f"an object ({kind.__name__})"
    return NAMES.get(kind, "an object")
