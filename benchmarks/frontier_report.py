"""The result file, table and picture of `benchmarks.frontier`: quality against cache bytes."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import environment
from kvjax.extras import pyplot
from kvjax.runs import whole_lines, write_json, write_whole

FULL = "original, full"
PICTURE = Path("docs/figures/frontier.png")
MARKERS = "osD^vPX*<>dp"
TICKS = (2, 5, 10, 20, 50, 100)
SECURE = 2.0
"""Standard errors from which a difference counts."""

Row = dict[str, Any]


def report(path: Path, picture: Path = PICTURE) -> None:
    """Writes the result file at `path`, the table beside it, and the picture."""
    settings, *lines = [json.loads(line) for line in whole_lines(path.with_suffix(".jsonl"))]
    rows = table(lines)
    facts = {name: lines[0][name] for name in ("date", "processor", "versions")}
    # Forms were run one after the other; without --forms, the command runs all of them.
    commands = dict.fromkeys(line["command"].partition(" --forms")[0] for line in lines)
    facts["command"] = "; ".join(commands)
    facts["commit"] = ", ".join(dict.fromkeys(line["commit"] for line in lines))
    facts["made_by"] = environment("benchmarks.frontier")["commit"]
    facts["cpu_seconds"] = round(sum(line["cpu_seconds"] for line in lines))
    write_json(path, {**settings, **facts, "rows": rows})
    write_whole(path.with_suffix(".md"), "\n".join(page(settings, facts, rows)) + "\n")
    draw(rows, picture)


def table(lines: Iterable[dict[str, Any]]) -> list[Row]:
    """One row for each form and label: bytes a token, right answers, perplexity, differences.

    Differences are to the original with the full cache on the same prompts or texts, with their
    standard errors.
    """
    answers: dict[str, dict[Any, float]] = defaultdict(dict)
    losses: dict[str, dict[Any, float]] = defaultdict(dict)
    held: dict[str, list[float]] = defaultdict(list)
    for line in lines:
        for label, judged in line["judged"].items():
            name = f"{line['form']}, {label}"
            into = answers if line["kind"] == "prompts" else losses
            for place, value in enumerate(judged):
                into[name][line["start"], place] = float(value)
            sizes = zip(line["bytes"][label], line["tokens"], strict=True)
            held[name] += [size / n for size, n in sizes if line["kind"] == "prompts"]
    rows = []
    for name, own in answers.items():
        full, whole = answers[FULL], losses[FULL]
        row: Row = {"name": name, "prompts": len(own), "bytes": round(float(np.mean(held[name])))}
        row["share"] = round(row["bytes"] / float(np.mean(held[FULL])), 4)
        row["right"] = round(float(np.mean(list(own.values()))), 4)
        row["right_change"], row["right_error"] = paired(own, full)
        text = losses[name]
        if text:
            row["texts"] = len(text)
            row["perplexity"] = round(float(np.exp(np.mean(list(text.values())))), 3)
            row["nats_change"], row["nats_error"] = paired(text, whole)
        rows.append(row)
    for row in rows:
        row["loses_to"] = [
            other["name"] for other in rows if plain(other["name"]) and loses(row, other, answers)
        ]
    return sorted(rows, key=lambda row: -row["bytes"])


def paired(own: dict[Any, float], base: dict[Any, float]) -> tuple[float, float]:
    """Mean difference on what both have, and its standard error."""
    both = [key for key in own if key in base]
    differences = np.asarray([own[key] - base[key] for key in both])
    error = differences.std(ddof=1) / len(both) ** 0.5 if len(both) > 1 else float("nan")
    return round(float(differences.mean()), 5), round(float(error), 5)


def plain(name: str) -> bool:
    """Whether a row is the original with smaller numbers and nothing else."""
    return name in (f"{FULL} + int8", f"{FULL} + int4")


def loses(row: Row, other: Row, answers: dict[str, dict[Any, float]]) -> bool:
    """Whether another row has no more bytes and is better: answers by two standard errors, or
    perplexity by two where the answers are not worse."""
    if row is other or other["bytes"] > row["bytes"]:
        return False
    change, error = paired(answers[row["name"]], answers[other["name"]])
    if change < -SECURE * error and change < 0:
        return True
    nats = row.get("nats_change", 0.0) - other.get("nats_change", 0.0)
    noise = np.hypot(row.get("nats_error", 0.0), other.get("nats_error", 0.0))
    return change <= 0 and nats > SECURE * noise


def page(settings: dict[str, Any], facts: dict[str, Any], rows: Sequence[Row]) -> list[str]:
    """The lines of the table."""
    prompts = max(row["prompts"] for row in rows)
    texts = max(row.get("texts", 0) for row in rows)
    lines = [
        "# Quality against cache bytes",
        "",
        f"`{facts['command']}`, commits {facts['commit']}, {facts['cpu_seconds'] / 60:.0f} minutes "
        f"of processor time. {settings['model']}; up to {prompts} prompts of about 1000 to 2000 "
        f"tokens ({', '.join(settings['tasks'])}) and {texts} texts: {settings['judged']} tokens "
        f"after a prefix of {settings['prefix']}. Changes are paired with the full cache of the "
        "original. Bytes are of a cache in bfloat16, per token of the prompt.",
        "",
        "| model and cache | bytes a token | of full | right | change | perplexity | log-loss | "
        "loses to |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        judged = ["–", "–"]
        if "texts" in row:
            change = f"{row['nats_change']:+.3f} ± {row['nats_error']:.3f}"
            judged = [f"{row['perplexity']:.2f}", change]
        change = f"{100 * row['right_change']:+.1f} ± {100 * row['right_error']:.1f}"
        cells = [row["name"], f"{row['bytes']:,}", f"{row['share']:.1%}"]
        cells += [f"{100 * row['right']:.1f} %", change, *judged]
        cells += ["; ".join(name.removeprefix("original, ") for name in row["loses_to"]) or "–"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw(rows: Sequence[Row], path: Path) -> None:
    """Right answers and log-loss against the share of the full cache's bytes."""
    plt = pyplot()
    colors = plt.get_cmap("tab10")  # one for each line
    figure, axes = plt.subplots(1, 2, figsize=(12.5, 4.5), layout="constrained")
    for number, (name, own) in enumerate(series(rows).items()):
        look = {"color": colors(number), "marker": MARKERS[number % len(MARKERS)]}
        shares = [100 * row["share"] for row in own]
        for axis, key in zip(axes, ("right", "nats_change"), strict=True):
            points = [(x, row[key]) for x, row in zip(shares, own, strict=True) if key in row]
            scale = 100 if key == "right" else 1
            if points:
                x, y = zip(*points, strict=True)
                axis.plot(x, [scale * value for value in y], label=name, **look)
    for axis, title in zip(
        axes, ("Right answers, %", "Loss above the full cache, nats a token"), strict=True
    ):
        axis.set_xscale("log")
        axis.set_xticks(TICKS, [f"{share} %" for share in TICKS])
        axis.minorticks_off()
        axis.set_xlabel("Cache bytes, share of the full bfloat16 cache")
        axis.set_title(title)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def series(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each line of the picture, by falling bytes.

    A label that ends in a number is a policy at one of its sizes. Budgets of converted models stay
    in the table: a line through several conversions would mean nothing.
    """
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        form, label = row["name"].split(", ", 1)
        method, _, ratio = label.rpartition(" ")
        is_size = ratio.replace(".", "", 1).isdigit()
        name = method if is_size else label.replace("full", "all tokens")
        if form != "original":
            if is_size:
                continue
            name = name.replace("all tokens", "decoupled")
        elif name.startswith("all tokens"):
            name = "smaller numbers"
        found[name].append(row)
    return dict(found)
