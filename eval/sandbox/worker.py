"""The answer's process: it executes the source, and then does what the test asks for.

This process knows nothing but the answer: neither the test nor what it expects, nor other answers,
nor who started it. All that it can do is to reply with values, right or wrong. So the program may
replace, trace or read everything in here; nothing that it finds decides about the verdict.

Requests are lines of JSON, {"do": name, …}; see `_Answer`. Replies are {"value": form} or
{"raised": [name of the exception's class, its text]}; forms are those of `eval.sandbox.values`.
"""

from __future__ import annotations

import json
import os
import sys
import types
from typing import Any, NoReturn

from eval.sandbox import values

TEXT = 500
"""Longest text of an exception, in characters."""


def serve(requests: int, replies: int) -> NoReturn:
    """Replies to requests until there are none, then ends the process.

    Args:
        requests, replies: descriptors.
    """
    leave = os._exit
    try:
        _serve(requests, replies, os.getpid())
    finally:
        # Whatever the program did to this loop, its process never returns to the keeper's code.
        leave(0)


def _serve(requests: int, replies: int, own: int) -> None:
    # Bound here: the program can replace these names where they come from.
    write, leave, getpid, loads, message = os.write, os._exit, os.getpid, json.loads, values.message
    answer = _Answer()
    for line in os.fdopen(requests, "rb"):
        try:
            reply = answer.reply(loads(line))
            text = message(reply)
        except BaseException as error:
            text = message({"raised": _described(error)})
        # A fork of the program has come to the end of its call: not a reply.
        if getpid() != own:
            leave(0)
        _flush()
        while text:
            text = text[write(replies, text) :]


class _Answer:
    """The program's module, and the objects of the program that the test has seen.

    Objects without a plain form stay here; the test knows them by their numbers.
    """

    def __init__(self) -> None:
        self.module = types.ModuleType("__main__")
        self.objects: list[Any] = []
        self.numbers: dict[int, int] = {}
        sys.modules["__main__"] = self.module
        sys.argv = ["program"]

    def reply(self, request: dict[str, Any]) -> dict[str, Any]:
        """Does what a request asks for. Any exception of the program comes out of here."""
        given = [self._decode(form) for form in request.get("given", [])]
        named = {name: self._decode(form) for name, form in request.get("named", {}).items()}
        before = [self._encode(value) for value in given]
        try:
            done = {"value": self._encode(self._do(request, given, named))}
        except Exception as error:
            done = {"raised": _described(error)}
        after = [self._encode(value) for value in given]
        # The function got copies of the test's arguments: say what it did to them.
        return done if after == before else {**done, "given": after}

    def _do(self, request: dict[str, Any], given: list[Any], named: dict[str, Any]) -> Any:
        do = request["do"]
        if do == "load":
            # Without this file's __future__ imports.
            code = compile(request["source"], "<program>", "exec", dont_inherit=True)
            exec(code, self.module.__dict__)
            return None
        if do == "name":
            return self._named(request["name"])
        target = self.objects[request["object"]]
        if do == "call":
            return target(*given, **named)
        if do == "get":
            return getattr(target, request["name"])
        if do == "set":
            return setattr(target, request["name"], given[0])
        if do == "iterate":
            return iter(target)
        return next(target)

    def _named(self, name: str) -> Any:
        if name not in self.module.__dict__:
            raise NameError(f"name {name!r} is not defined")
        return self.module.__dict__[name]

    def _encode(self, value: Any) -> values.Form:
        return values.encode(value, self._keep)

    def _decode(self, form: values.Form) -> Any:
        return values.decode(form, lambda content: self.objects[content[0]])

    def _keep(self, value: Any) -> values.Form:
        # They stay alive, so no other object gets the same id.
        number = self.numbers.setdefault(id(value), len(self.objects))
        if number == len(self.objects):
            self.objects.append(value)
        return {"object": [number, type(value).__name__]}


def _described(error: BaseException) -> list[str]:
    name = type(error).__name__
    try:
        return [name, str(error)[:TEXT]]
    except BaseException:
        return [name, ""]


def _flush() -> None:
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # the program closed or replaced them
        pass
