"""The test's process: it executes the test, which sees the answer through values only.

The answer lives in another process (eval/sandbox/worker.py). A name of the answer in the test is a
`Remote`: a call of it sends the arguments there and builds the result here. Nothing of the answer
runs in this process, so what it does to built-in functions, frames, threads or signals stays
where it is. A reply that is not one ends the test, and the test fails.
"""

from __future__ import annotations

import builtins
import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from eval.sandbox import values

TEXT = 500


class Program(NamedTuple):
    """An answer and its test.

    Attributes:
        answer: source of the model's program.
        test: source that raises an exception where the answer is wrong; "" asks only that the
            answer runs to its end.
        given: source that belongs to the problem, executed before the test: imports, helpers.
        names: the names of the answer that the test sees.
    """

    answer: str
    test: str = ""
    given: str = ""
    names: tuple[str, ...] = ()


class AnswerError(Exception):
    """The answer raised an exception that is not a built-in one."""


ENDED = "the answer ended"


class AnswerEnded(BaseException):
    """There are no more replies. No test catches this."""


class Line:
    """Requests to the answer's process, and its replies.

    Attributes:
        ended: why there are no more replies, or "".
    """

    def __init__(self, requests: int, replies: int):
        self.requests = requests
        self.replies = os.fdopen(replies, "rb")
        self.ended = ""

    def ask(self, do: str, given: Sequence[Any] = (), **rest: Any) -> Any:
        """The value of the reply to a request.

        Raises:
            Exception: the answer raised it.
            AnswerEnded: the reply is none.
        """
        forms = [values.encode(value, _known) for value in given]
        request = values.message({"do": do, "given": forms, **rest})
        try:
            if self.ended:
                raise EOFError(self.ended)
            self._send(request)
            reply = self._receive()
            # All forms are decoded before anything of the test is changed.
            changed = [self._decode(form) for form in reply.get("given", forms[:0])]
            raised = _exception(*reply["raised"]) if "raised" in reply else None
            value = None if raised else self._decode(reply["value"])
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            self.ended = self.ended or f"the answer wrote no reply but something else ({why})"
            raise AnswerEnded(self.ended) from None
        for old, new in zip(given, changed, strict=False):
            values.refresh(old, new)
        if raised:
            raise raised
        return value

    def _send(self, text: bytes) -> None:
        try:
            while text:
                text = text[os.write(self.requests, text) :]
        except BrokenPipeError:
            pass  # the reply is missing then, too

    def _receive(self) -> dict[str, Any]:
        text = self.replies.readline(values.LONGEST + 1)
        if not text.endswith(b"\n"):
            self.ended = "the answer wrote a reply without an end" if text else ENDED
            raise EOFError
        reply = json.loads(text)
        if not isinstance(reply, dict):
            raise TypeError(f"a {type(reply).__name__}, expected an object")
        return reply

    def _decode(self, form: values.Form) -> Any:
        return values.decode(form, lambda content: Remote(self, *content))


class Remote:
    """An object of the answer without a plain form: a function, an instance, an iterator.

    The test can call it, iterate over it, and read and set its attributes. It equals nothing and
    is neither true nor false: asking raises TypeError.
    """

    __slots__ = ("_Remote__kind", "_Remote__line", "_Remote__number")

    def __init__(self, line: Line, number: int, kind: str):
        if type(number) is not int or type(kind) is not str:
            raise TypeError("no number and type of an object")
        for name, value in (("line", line), ("number", number), ("kind", kind[:TEXT])):
            object.__setattr__(self, f"_Remote__{name}", value)

    def __call__(self, *given: Any, **named: Any) -> Any:
        forms = {name: values.encode(value, _known) for name, value in named.items()}
        return self.__line.ask("call", given, object=self.__number, named=forms)

    def __getattr__(self, name: str) -> Any:
        # Python asks for dunders by itself, as in `copy` and `pickle`.
        if name.startswith("__"):
            raise AttributeError(name)
        return self.__line.ask("get", object=self.__number, name=name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.__line.ask("set", [value], object=self.__number, name=name)

    def __iter__(self) -> Any:
        return self.__line.ask("iterate", object=self.__number)

    def __next__(self) -> Any:
        return self.__line.ask("next", object=self.__number)

    def __repr__(self) -> str:
        return f"an object of the answer's type {self.__kind!r}"

    def _no_value(self, *others: Any) -> Any:
        raise TypeError(f"{self!r} has no plain value, so it cannot be compared")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __hash__ = _no_value  # type: ignore[assignment]


def _known(value: Any) -> values.Form:
    if isinstance(value, Remote):
        return {"object": [object.__getattribute__(value, "_Remote__number"), ""]}
    raise TypeError(f"a {type(value).__name__} cannot be given to an answer, expected plain values")


def _exception(name: Any, text: Any) -> Exception:
    """The built-in exception of this name, or an `AnswerError`."""
    if type(name) is not str or type(text) is not str:
        raise TypeError("no name and text of an exception")
    kind = vars(builtins).get(name)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(text) if text else kind()
        except TypeError:
            pass  # some need more than a text
    return AnswerError(f"{name}: {text}" if text else name)


def judge(program: Program, requests: int, replies: int) -> dict[str, Any]:
    """Executes a test against the answer at the other end of two descriptors.

    Returns:
        {"passed", "reason": "passed" or the exception that ended the test, "ended": whether it was
        the end of the answer's process}.
    """
    line, passed = Line(requests, replies), False
    try:
        space: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(program.given, "<given>", "exec", dont_inherit=True), space)
        test = compile(program.test, "<test>", "exec", dont_inherit=True)
        line.ask("load", source=program.answer)
        for name in program.names:
            space.pop(name, None)
            space[name] = line.ask("name", name=name)
        exec(test, space)
        passed, reason = not line.ended, line.ended or "passed"
    except BaseException as error:
        reason = line.ended or described(error)
    return {"passed": passed, "reason": reason[:TEXT], "ended": line.ended == ENDED}


def described(error: BaseException) -> str:
    """Name and text of an exception; an `AnswerError` has the name of the answer's."""
    name = "" if isinstance(error, AnswerError) else f"{type(error).__name__}: "
    try:
        text = f"{name}{error}"
    except Exception:
        text = name
    return text.removesuffix(": ")[:TEXT]
