"""Progress of anything that takes longer than a moment."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def progress_bar(quiet: bool = False) -> Progress:
    """A bar with the time that remains, on standard error; none where nobody sees it."""
    columns = (BarColumn(), TextColumn("{task.fields[items]}"), TimeElapsedColumn())
    return Progress(
        TextColumn("{task.description}"),
        *columns,
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=quiet or not sys.stderr.isatty(),
    )
