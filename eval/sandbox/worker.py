"""The process that executes a program, and says whether it came to its end."""

from __future__ import annotations

import json
import os
import sys
import types
from collections.abc import Callable
from typing import NoReturn

REASON_CHARACTERS = 500


def work(
    program: str, confine: Callable[[], None], output: int, result: int, token: str
) -> NoReturn:
    """Confines this process, executes `program` as __main__, and ends.

    Args:
        program: source text. It passes when it runs to its end without an exception, SystemExit
            among them.
        confine: raises OSError when it cannot.
        output: descriptor for stdout and stderr.
        result: descriptor for one line of JSON: {"setup": why it did not start}, {"reason": …},
            or {"passed": token}, which a program that merely exits does not write.
        token: of this run.
    """
    write, dumps, leave, getpid = os.write, json.dumps, os._exit, os.getpid
    worker = getpid()
    try:
        result = _rewire(output, result)
        confine()
    except BaseException as error:
        write(result, dumps({"setup": f"{type(error).__name__}: {error}"}).encode())
        leave(1)
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv = ["program"]
    try:
        exec(compile(program, "<program>", "exec"), module.__dict__)
        answer = {"passed": token}
    except BaseException as error:
        answer = {"reason": _describe(error)}
    if getpid() != worker:  # a fork of it, which came to this end too
        leave(0)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # closed or replaced by the program, whose matter that is
        pass
    write(result, dumps(answer).encode())
    leave(0)


def _rewire(output: int, result: int) -> int:
    """No descriptors but an empty stdin, the output twice, and the result as 3."""
    result = os.dup(result)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if result != 3:
        os.dup2(result, 3)
    os.closerange(4, 1 << 16)
    return 3


def _describe(error: BaseException) -> str:
    try:
        text = f"{type(error).__name__}: {error}"
    except BaseException:
        text = type(error).__name__
    return text.removesuffix(": ")[:REASON_CHARACTERS]
