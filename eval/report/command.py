"""`python -m eval report`: index.html and its pictures from folders of finished runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console
from tyro.conf import OmitArgPrefixes, Positional, arg

from kvjax.checks import COUNT, check_ranges, optional
from kvjax.endings import STARTS_OVER, only_writer
from kvjax.paths import check_local
from kvjax.runs import write_whole

PAGE = "index.html"


@dataclass(frozen=True)
class ReportCommand:
    """Writes index.html, with its pictures beside it, from finished runs.

    Attributes:
        runs: folders of runs, folders that contain such folders, or training logs (.jsonl).
        out: folder of the page.
        head_scores: score files to show in addition to those of the runs' models.
        kv_size: tokens per KV head, for the budgets that are shown with the scores.
    """

    runs: Positional[Annotated[tuple[Path, ...], arg(metavar="RUNS")]]
    out: Path = Path("report")
    title: str = "Evaluation"
    head_scores: tuple[Path, ...] = ()
    kv_size: int = 128


def report(command: OmitArgPrefixes[ReportCommand]) -> None:
    """Writes index.html, with its pictures beside it, from finished runs."""
    Console(soft_wrap=True, highlight=False).print(str(write(command)), markup=False)


def write(command: ReportCommand) -> Path:
    """Writes the page.

    Returns:
        Path of index.html.

    Raises:
        ValueError: a URL, a folder without results, a damaged file, or no runs at all.
    """
    from eval.report import sections
    from eval.report.page import Pictures, document
    from eval.report.runs import find

    check_local(command)
    check_ranges(vars(command), {"kv_size": optional(COUNT)})
    runs = find(command.runs)
    with only_writer(command.out, STARTS_OVER):
        pictures = Pictures(command.out)
        parts = [
            sections.overview(runs),
            *sections.results(runs, pictures),
            *sections.against_bytes(runs, pictures),
            *sections.importance(runs, command.head_scores, command.kv_size, pictures),
            *sections.kept(runs, pictures),
            *sections.against_context(runs, pictures),
            *sections.training(runs, pictures),
            sections.provenance(runs),
        ]
        path = command.out / PAGE
        write_whole(path, document(command.title, parts))
    return path
