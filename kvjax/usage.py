"""Arguments that tyro refuses, as errors of ours: a line for each problem, and no box."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from kvjax.fields import Problems, shown

QUOTED = re.compile(r"'([^']*)'")
"""The value, in what tyro says about one that it cannot convert."""


@contextlib.contextmanager
def plain_usage_errors() -> Iterator[None]:
    """Within the block, arguments that tyro refuses raise `Problems`; --help stays as it is.

    tyro gives its refusals to a hook, which it calls private and unstable. A version of tyro
    without this hook, or with other refusals, prints its own box and ends with exit code 2.
    """
    try:
        from tyro._errors import on_parse_error
    except ImportError:
        yield
        return
    with on_parse_error(_refuse):
        yield


def _refuse(event: Any) -> None:
    try:
        lines, progs = list(_lines(event)), event._help_progs()
    except AttributeError:  # of another version
        return
    if lines:
        prog = progs if isinstance(progs, str) else progs[-1]
        raise Problems([*lines[:-1], f"{lines[-1]}; see `{prog} --help`"])


def _lines(event: Any) -> Iterator[str]:
    """The problems of a refusal; none for a kind that is not known here."""
    kind = type(event).__name__
    if kind == "MissingArgs":
        for missing in event.missing_arguments:
            yield f"got no {_name(missing.arg)}, which is required"
        yield from _unknown(event.unrecognized_tokens)
    elif kind == "UnrecognizedArgs":
        yield from _unknown(event.tokens)
    elif kind == "MissingSubcommand":
        names = ", ".join(event.subcommand_spec.parser_from_name)
        got = event.found_token
        yield f"got {'no command' if got is None else shown(got)}, expected one of {names}"
    elif kind == "InvalidChoice":
        yield f"{_name(event.argument)} is {shown(event.value)}, expected one of " + ", ".join(
            event.choices
        )
    elif kind == "BadValue" and event.reason == "too_few_values":
        yield f"got {_name(event.argument)} with too few values, or with none"
    elif kind == "MutexConflict":
        yield f"got {event.first_token} and {event.second_token}, expected one of them"
    elif kind == "InstantiationFailure":
        yield from _not_made(event)


def _not_made(event: Any) -> Iterator[str]:
    """The problems of values of which no argument, or no settings, can be made."""
    if event.argument is None:  # said by our own checks
        yield from str(event.message).splitlines()
        return
    got = QUOTED.search(str(event.message))
    said = "cannot be read" if got is None else f"is {shown(got[1])}"
    yield f"{_name(event.argument)} {said}, expected {event.argument.lowered.metavar}"


def _unknown(tokens: list[str]) -> Iterator[str]:
    for token in tokens:
        yield f"got {token}, which this command does not take"


def _name(argument: Any) -> str:
    if argument.is_positional():
        return str(argument.lowered.metavar)
    return argument.lowered.name_or_flags[-1]
