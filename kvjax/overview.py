"""The help of the whole `kvjax` command: each command with a sentence and an example."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvjax import compilation_cache

WIDTH = 10
"""Columns of a command's name."""

POLICIES = (
    "full headkv headkv_paper headkv_adaptive spankv snapkv adasnapkv",
    "pyramidkv h2o tova expected knorm keydiff streaming",
)
"""Written down, because help does not wait for jax, which the policies import."""

TEXT = """\
usage: kvjax COMMAND …          kvjax COMMAND --help explains its options

Smaller KV caches for existing language models.
{commands}

MODEL   a checkpoint's directory, a .gguf file, a hub id, or builtin:smollm2
POLICY  what the cache keeps, such as headkv:ratio=0.2; one of
        {policies}

{cache}"""


def overview(groups: Mapping[str, Sequence[Callable[..., Any]]]) -> str:
    """The help, from the commands' docstrings: first line and "Example:".

    Args:
        groups: commands by the title of their group.
    """
    lines = []
    for title, commands in groups.items():
        lines += ["", title]
        for command in commands:
            said = inspect.cleandoc(command.__doc__ or "").splitlines()
            about = said[0].removesuffix(".")
            lines.append(f"  {command.__name__:{WIDTH}}{about[0].lower()}{about[1:]}")
            examples = [line for line in said if line.startswith("Example: ")]
            lines += [f"  {'':{WIDTH}}  {line.removeprefix('Example: ')}" for line in examples]
    return TEXT.format(
        commands="\n".join(lines),
        policies="\n        ".join(POLICIES),
        cache=compilation_cache.HELP,
    )
