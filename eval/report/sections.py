"""Parts of the page: all runs, latency, training, and how each run was made."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from eval.report import page
from eval.report.pictures import Pictures
from eval.report.runs import Run


def overview(runs: Sequence[Run]) -> str:
    """A table with one line for each run."""
    rows = [
        [
            run.name,
            run.results.get("task", "training"),
            run.results.get("model"),
            run.results.get("items"),
            run.results.get("protocol"),
            run.results.get("device"),
            run.results.get("date"),
        ]
        for run in runs
    ]
    header = ("run", "task", "model", "items", "protocol", "device", "date")
    return page.section("Runs", page.table(header, rows))


def against_context(runs: Sequence[Run], pictures: Pictures) -> list[str]:
    """Memory and time against the prompt's length."""
    sections = []
    for run in runs:
        if run.kind != "latency":
            continue
        rows = run.results["rows"]
        parts = []
        # One picture for each number, with a line for each policy and batch.
        wanted = (
            ("cache_bytes", "cache", "MiB", 2.0**-20),
            ("time_to_first_token", "time to the first token", "ms", 1e3),
            ("time_per_token", "time per token", "ms", 1e3),
        )
        for key, what, unit, factor in wanted:
            curves: dict[str, list[tuple[float, float, float | None]]] = defaultdict(list)
            for row in rows:
                if row.get(key) is not None:
                    label = f"{row['policy']}, batch {row['batch']}"
                    curves[label].append((row["context"], row[key] * factor, None))
            if curves:
                names = ("context, tokens", f"{what}, {unit}")
                file = pictures.lines(f"{run.name} {key}", curves, names)
                alt = f"{what} against context for {', '.join(curves)}"
                parts.append(page.figure(file, alt))
        header = (
            *("policy", "context", "batch", "first token, ms", "per token, ms"),
            *("cache", "full cache", "device peak"),
        )
        table = page.table(
            header,
            [
                [
                    *(row["policy"], row["context"], row["batch"]),
                    *(_ms(row.get(k)) for k in ("time_to_first_token", "time_per_token")),
                    page.size(row["cache_bytes"]),
                    page.size(row.get("full_cache_bytes")),
                    page.size(row.get("device_peak_bytes")),
                ]
                for row in rows
            ],
            "medians",
        )
        sections.append(
            page.section(f"Memory and time: {run.results.get('model', run.name)}", *parts, table)
        )
    return sections


def training(runs: Sequence[Run], pictures: Pictures) -> list[str]:
    """Loss curves of all training runs, in one picture."""
    logs = {run.name: run.log for run in runs if run.kind == "training"}
    if not logs:
        return []
    curves = {
        name: [(line["step"], line["loss"], None) for line in lines] for name, lines in logs.items()
    }
    file = pictures.lines("loss", curves, ("step", "loss"), markers=False)
    alt = f"Training loss against step for {', '.join(curves)}"
    rows = [
        [
            name,
            lines[-1]["step"],
            page.number(lines[0]["loss"]),
            page.number(lines[-1]["loss"]),
            page.number(min(line["loss"] for line in lines)),
            lines[-1].get("learning_rate"),
        ]
        for name, lines in logs.items()
    ]
    header = ("run", "steps", "first loss", "last loss", "least loss", "last learning rate")
    return [page.section("Training", page.figure(file, alt), page.table(header, rows))]


def provenance(runs: Sequence[Run]) -> str:
    """The command, device, versions and commit of every run."""
    parts = []
    for run in runs:
        r = run.results
        versions = r.get("versions") or {}
        parts += [
            page.heading(run.name),
            page.code(r["command"])
            if r.get("command")
            else page.paragraph("No command on record."),
            page.facts(
                [
                    ("device", r.get("device")),
                    ("dtype", r.get("dtype")),
                    ("seed", r.get("seed")),
                    ("date", r.get("date")),
                    ("seconds", r.get("seconds")),
                    ("commit", r.get("commit")),
                    ("versions", ", ".join(f"{name} {v}" for name, v in versions.items())),
                ]
            ),
        ]
    return page.section("How each run was made", *parts)


def _ms(seconds: float | None) -> str | None:
    return None if seconds is None else page.number(1e3 * seconds, 2)
