"""The result file and the table of `benchmarks.coder_tasks`: scores and paired tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from benchmarks.frontier_report import paired
from eval.results import standard_error
from kvjax.runs import whole_lines, write_json

Row = dict[str, Any]
FULL = "original", "full"
EQUAL = "equal_cache"
COMMAND = "python -m benchmarks.coder_tasks run MODEL DATA TEXT --folder FOLDER"


def report(out: Path) -> None:
    """Writes `out` and the table beside it, from the lines of OUT's .jsonl."""
    every = [json.loads(line) for line in whole_lines(out.with_suffix(".jsonl"))]
    lines = [line for line in every if line["form"] != EQUAL]
    fed = [line for line in every if line["form"] == EQUAL]
    found = {(line["task"], line["form"], line["policy"]): line for line in lines}
    rows = [row_of(line, found[line["task"], *FULL]) for line in lines]
    names = ("date", "processor", "cores", "versions", "commit", "command")
    about = {name: lines[-1][name] for name in names}
    write_json(out, {**about, "rows": rows, "equal_cache": [equal_row(line) for line in fed]})
    text = "\n".join([*page(rows, lines), *equal_page(fed)]) + "\n"
    out.with_suffix(".md").write_text(text)
    print(text)


def row_of(line: Row, base: Row) -> Row:
    """Score, cache and the paired test of a form under a policy against the original model."""
    own, whole = line["scores"], base["scores"]
    change, error = paired(own, whole)
    lost = sum(own[key] < whole[key] for key in own)
    won = sum(own[key] > whole[key] for key in own)
    score = sum(own.values()) / len(own)
    return {
        "task": line["task"],
        "form": line["form"],
        "policy": line["policy"],
        "items": len(own),
        "score": round(score, 4),
        "error": round(standard_error(list(own.values())), 4),
        "change": change,
        "change_error": error,
        "lost": lost,
        "won": won,
        "p": round(sign_test(lost, won), 4),
        "same_text": sum(line["texts"][key] == base["texts"][key] for key in own),
        "share": round(bytes_in_bfloat16(line) / (base["full_cache_bytes"] / 2), 4),
    }


def bytes_in_bfloat16(line: Row) -> float:
    """The cache's bytes as they would be with a model in bfloat16, for a run in fp32: half of them,
    but for entries in 8 or 4 bits, which are the same."""
    return line["cache_bytes"] / (1 if "entries=" in line["policy"] else 2)


def sign_test(lost: int, won: int) -> float:
    """Two-sided probability of a split at least this uneven, if both sides are equally likely."""
    return float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0


def page(rows: list[Row], lines: list[Row]) -> list[str]:
    """The lines of the table."""
    commits = ", ".join(dict.fromkeys(line["commit"] for line in lines))
    text = [
        "# GSM8K and HumanEval of Qwen2.5-Coder-1.5B-Instruct with smaller caches",
        "",
        f"`{COMMAND}`, commits {commits}. Greedy answers in fp32.",
        "Each row is compared with the original's full cache item by item: answers lost and won,",
        'and the two-sided sign test. "Same text" counts answers equal to the last character.',
        "The cache is that of prompt and room for the answer, in bytes against the original's full",
        "cache in bfloat16.",
        "",
        "| task | form | policy | cache | right | change | lost, won | p | same text |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        right = f"{100 * row['score']:.0f} ± {100 * row['error']:.0f} % of {row['items']}"
        change = f"{100 * row['change']:+.0f} ± {100 * row['change_error']:.1f}"
        text.append(
            f"| {row['task']} | {row['form']} | {row['policy']} | {100 * row['share']:.0f} % "
            f"| {right} | {change} | {row['lost']}, {row['won']} | {row['p']:.2f} "
            f"| {row['same_text']} |"
        )
    return text


def equal_row(line: Row) -> Row:
    return {name: line[name] for name in ("task", "items", "tokens", "same", "tied", "different")}


def equal_page(fed: list[Row]) -> list[str]:
    """The lines about the equal_cache conversion; see `benchmarks.coder_tasks_equal`."""
    if not fed:
        return []
    text = [
        "",
        "The equal_cache conversion, fed each prompt with the original's answer (job `equal`):",
        "items where its best token is the original's at every place; ties, where the original's",
        "two best logits are less than .001 apart at the first difference; and other items.",
        "",
        "| task | items | tokens | same | tied | different |",
        "|---|---|---|---|---|---|",
    ]
    return text + [
        f"| {line['task']} | {line['items']} | {line['tokens']} | {line['same']} | {line['tied']} "
        f"| {len(line['different'])} |"
        for line in fed
    ]
