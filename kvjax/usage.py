"""Arguments that a command refuses, as errors of ours: a line for each problem, and no box."""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import io
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from kvjax.fields import Problems, shown

QUOTED = re.compile(r"'([^']*)'")
"""The value, in what tyro says about one that it cannot convert."""
OPTION = re.compile(r"--[a-z][\w-]*")
"""An option in the help of a command."""


class Refused(Problems):
    """Arguments that tyro refuses; `event` is its refusal."""

    def __init__(self, lines: Sequence[str], event: Any):
        super().__init__(lines)
        self.event = event


def parsed(wanted: Any, prog: str, argv: Sequence[str], **more: Any) -> Any:
    """What `tyro.cli` makes of arguments.

    Args:
        wanted: a type, a function, or functions by the name of their subcommand.
        more: for tyro, such as `default`.

    Raises:
        Problems: arguments that are refused, within `plain_usage_errors`. The line of an unknown
            option names the nearest one.
    """
    import tyro

    by_name = isinstance(wanted, Mapping)
    cli = tyro.extras.subcommand_cli_from_dict if by_name else tyro.cli
    parse = functools.partial(cli, wanted, prog=prog, **more)
    try:
        return parse(args=list(argv))
    except Refused as refused:
        # tyro names the whole program in most refusals, not the subcommand.
        words = [word for word in argv[:1] if by_name and word in wanted]
        known = set()
        if _unknown_tokens(refused.event):
            text = io.StringIO()
            with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
                parse(args=[*words, "--help"])
            known = set(OPTION.findall(text.getvalue()))
        raise Problems(_problems(refused.event, " ".join([prog, *words]), known)) from None


def check_command(argv: Sequence[str], commands: Collection[str]) -> None:
    """Raises ValueError where the first argument is a word that is no command."""
    name = argv[0] if argv else ""
    if name and not name.startswith("-") and name not in commands:
        near = difflib.get_close_matches(name, commands, 1)
        hint = f"; the nearest is {near[0]}" if near else ""
        raise ValueError(f"got {shown(name)}, expected one of {', '.join(commands)}{hint}")


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
        lines = _problems(event)
    except AttributeError:  # of another version
        return
    if lines:
        raise Refused(lines, event)


def _problems(event: Any, prog: str = "", known: Collection[str] = ()) -> list[str]:
    """The problems of a refusal; none for a kind that is not known here.

    Args:
        prog: the command with the help; "": as tyro has it.
        known: the options of the command.
    """
    progs = prog or event._help_progs()
    lines = list(_lines(event, known))
    hint = f"see `{progs if isinstance(progs, str) else progs[-1]} --help`"
    return [*lines[:-1], f"{lines[-1]}; {hint}"] if lines else []


def _lines(event: Any, known: Collection[str]) -> Iterator[str]:
    kind = type(event).__name__
    if kind == "MissingArgs":
        for missing in event.missing_arguments:
            yield f"got no {_name(missing.arg)}, which is required"
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
    for token in _unknown_tokens(event):
        yield f"got {token}, which this command does not take{_nearest(token, known)}"


def _not_made(event: Any) -> Iterator[str]:
    """The problems of values of which no argument, or no settings, can be made."""
    if event.argument is None:  # said by our own checks
        yield from str(event.message).splitlines()
        return
    got = QUOTED.search(str(event.message))
    said = "cannot be read" if got is None else f"is {shown(got[1])}"
    yield f"{_name(event.argument)} {said}, expected {event.argument.lowered.metavar}"


def _unknown_tokens(event: Any) -> Sequence[str]:
    """The words of the command line that are no argument of the command."""
    name = {"UnrecognizedArgs": "tokens", "MissingArgs": "unrecognized_tokens"}
    return getattr(event, name[kind]) if (kind := type(event).__name__) in name else ()


def _nearest(token: str, known: Collection[str]) -> str:
    """The end of the line of an unknown word: the nearest option, if there is one."""
    if not token.startswith("--"):
        return ""
    near = difflib.get_close_matches(token.partition("=")[0].replace("_", "-"), known, 1)
    return f"; the nearest option is {near[0]}" if near else ""


def _name(argument: Any) -> str:
    if argument.is_positional():
        return str(argument.lowered.metavar)
    return argument.lowered.name_or_flags[-1]


def changed(command: Callable[..., Any], given: Mapping[str, Any], *names: str) -> list[str]:
    """The names of the arguments that differ from the defaults of `command`.

    Args:
        names: arguments to look at; none for all of them.
    """
    defaults = inspect.signature(command).parameters
    return [name for name in names or defaults if given[name] != defaults[name].default]


def refuse_unread(option: str, chosen: str, changed: Mapping[str, Sequence[str]]) -> None:
    """Refuses settings that the user changed and that the chosen value of `option` does not read.

    Args:
        changed: for each value of `option`, the changed settings that only this value reads.

    Raises:
        ValueError: names the settings.
    """
    unread = [
        f"--{name.replace('_', '-')} (of {option} {choice})"
        for choice, names in changed.items()
        if choice != chosen
        for name in names
    ]
    if unread:
        raise ValueError(f"{option} is {chosen}, which does not read {', '.join(unread)}")
