"""The table of benchmarks/results/cold_start.md, from what `benchmarks.cold_start` measured.

    python -m benchmarks.cold_start_report

Each cell has the number of cold_start_before.json, and that of cold_start.json where there is one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path("benchmarks/results")
FILES = ("cold_start_before.json", "cold_start.json")
PAGE = RESULTS / "cold_start.md"
MARKERS = ("<!-- made by benchmarks.cold_start_report -->\n", "<!-- end -->\n")
CHANGED = ("other policy", "other KV size", "other max_new_tokens", "other prompt length")
HEADER = (
    *("layers", "model", "policy", "second call", "first call adds", "trace, lower", "compile"),
    *("programs", *CHANGED, "first call adds in another process"),
)


def main() -> None:
    runs = [json.loads(path.read_text()) for name in FILES if (path := RESULTS / name).is_file()]
    table = [HEADER, ("---",) * len(HEADER), *rows([run["rows"] for run in runs])]
    before, rest = PAGE.read_text().split(MARKERS[0])
    after = rest.split(MARKERS[1])[1]
    commits = " → ".join(f"{run['commit']} ({run['date']})" for run in runs)
    machine = f"{runs[0]['cores']} cores of an {runs[0]['processor']}"
    lines = [f"Commits {commits}, jax {runs[-1]['versions']['jax']}, {machine}.", ""]
    lines += [f"| {' | '.join(row)} |" for row in table]
    PAGE.write_text(before + MARKERS[0] + "\n".join(lines) + "\n" + MARKERS[1] + after)


def rows(runs: list[list[dict[str, Any]]]) -> list[tuple[str, ...]]:
    """One line for each model and policy; a cell has the numbers of all runs, – for none."""
    names = dict.fromkeys(name(row) for run in runs for row in run)
    found = [{name(row): numbers(row) for row in run} for run in runs]
    missing = ["–"] * (len(HEADER) - 3)
    lines = []
    for key in names:
        cells = zip(*(run.get(key, missing) for run in found), strict=True)
        lines.append((*key, *(" → ".join(cell) for cell in cells)))
    return lines


def name(row: dict[str, Any]) -> tuple[str, str, str]:
    return str(row["layers"]), row["kind"], row["policy"]


def numbers(row: dict[str, Any]) -> list[str]:
    """The cells of one row of one run; – for a call that was not made."""
    calls = {call["call"]: call for call in row["empty_cache"]["calls"]}
    again, repeated = row["filled_cache"]["calls"][:2]
    first, second = calls["first"], calls["second"]
    return [
        f"{second['cpu_s']:.1f}",
        f"{first['cpu_s'] - second['cpu_s']:.1f}",
        f"{first['trace_s'] + first['lower_s']:.1f}",
        f"{first['compile_s']:.1f}",
        str(first["compiled"]),
        *(programs(calls.get(call)) for call in CHANGED),
        f"{again['to_first_tokens_s'] - repeated['to_first_tokens_s']:.1f}",
    ]


def programs(call: dict[str, Any] | None) -> str:
    """Seconds of a call for programs, and how many it compiled or read."""
    if call is None:
        return "–"
    return f"{call['cpu_s'] - call['run_s']:.1f} ({call['compiled'] + call['read']})"


if __name__ == "__main__":
    main()
