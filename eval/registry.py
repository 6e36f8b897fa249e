"""Tasks by name; their modules are imported when they are asked for."""

from __future__ import annotations

import importlib
from typing import Any

from eval.reads import Reads
from eval.task import Task, TaskOptions

TASKS = {
    "needle": "eval.tasks.needle",
    "reasoning": "eval.tasks.reasoning",
    "babilong": "eval.tasks.babilong",
    "ruler": "eval.tasks.ruler",
    "longbench": "eval.tasks.longbench",
    "loogle": "eval.tasks.loogle",
    "longchat": "eval.tasks.longchat",
    "gsm8k": "eval.tasks.gsm8k",
    "humaneval": "eval.tasks.humaneval",
    "mbpp": "eval.tasks.mbpp",
}
"""Name → module with `load(options: TaskOptions) -> Task` and `reads(options) -> Reads`."""


def reads(name: str, options: TaskOptions) -> Reads:
    """What the task reads of options like these.

    Raises:
        ValueError: no such task.
    """
    return _module(name).reads(options)


def load_task(name: str, options: TaskOptions) -> Task:
    """The task of this name.

    Raises:
        ValueError: no such task, options that it would ignore, or data that it cannot read.
    """
    return _module(name).load(options)


def _module(name: str) -> Any:
    if name not in TASKS:
        raise ValueError(f"no task {name!r}, expected one of {', '.join(TASKS)}")
    return importlib.import_module(TASKS[name])
