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
        title: of the page; None: names the model.
        kv_size: also show the budgets that the scores give at so many tokens per KV head.
    """

    runs: Positional[Annotated[tuple[Path, ...], arg(metavar="RUNS")]]
    out: Path = Path("report")
    title: str | None = None
    head_scores: tuple[Path, ...] = ()
    kv_size: int | None = None


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
    from eval.report import heads, scores, sections
    from eval.report.page import document
    from eval.report.pictures import Pictures
    from eval.report.runs import find

    check_local(command)
    check_ranges(vars(command), {"kv_size": optional(COUNT)})
    runs = find(command.runs)
    with only_writer(command.out, STARTS_OVER):
        pictures = Pictures(command.out)
        parts = [
            *scores.results(runs, pictures),
            *heads.importance(runs, command.head_scores, command.kv_size, pictures),
            *heads.kept(runs, pictures),
            *sections.against_context(runs, pictures),
            *sections.training(runs, pictures),
            sections.overview(runs),
            sections.provenance(runs),
        ]
        path = command.out / PAGE
        models = {str(run.results["model"]) for run in runs if run.results.get("model")}
        title = f"Evaluation of {models.pop()}" if len(models) == 1 else "Evaluation"
        write_whole(path, document(command.title or title, parts))
    return path
