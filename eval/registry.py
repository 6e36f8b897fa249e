"""Tasks by name; their modules are imported when they are asked for."""

from __future__ import annotations

import importlib

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
"""Name → module with `load(options: TaskOptions) -> Task`."""


def load_task(name: str, options: TaskOptions) -> Task:
    """The task of this name.

    Raises:
        ValueError: no such task, or data that it cannot read.
    """
    if name not in TASKS:
        raise ValueError(f"no task {name!r}, expected one of {', '.join(TASKS)}")
    return importlib.import_module(TASKS[name]).load(options)
