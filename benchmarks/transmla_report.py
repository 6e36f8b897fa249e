"""The rows of benchmarks.transmla as a Markdown table for each model.

python -m benchmarks.transmla_report [benchmarks/results/transmla.json] > …/transmla.md
"""

from __future__ import annotations

import json
import sys
from typing import Any

from kvjax.paths import local_path

METRICS = ("perplexity", "needle", "multi_key", "two_hop")


def table(rows: list[dict[str, Any]]) -> str:
    """One line a row, the metrics that the model has."""
    metrics = [metric for metric in METRICS if metric in rows[0]]
    lines = [
        "| cache | conversion | rope_dim + rank | " + " | ".join(metrics) + " | seconds |",
        "|---" * (len(metrics) + 4) + "|",
    ]
    for row in rows:
        cells = [f"{row['cache']:.0%}", row["row"], sizes(row)]
        cells += [f"{row[metric]:.3f}" for metric in metrics]
        lines.append("| " + " | ".join([*cells, f"{row['seconds']:.0f}"]) + " |")
    return "\n".join(lines)


def sizes(row: dict[str, Any]) -> str:
    """rope_dim + rank, or both lists where layers differ."""
    if "rope_dim" not in row:
        return "–"
    if isinstance(row["rope_dim"], list):
        pairs = zip(row["rope_dim"], row["kv_rank"], strict=True)
        return ", ".join(f"{rope} + {rank}" for rope, rank in pairs)
    return f"{row['rope_dim']} + {row['kv_rank']}"


def main() -> None:
    path = local_path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/results/transmla.json")
    result = json.loads(path.read_text())
    about = result["environment"]
    print("# The decoupled conversion, part by part\n")
    print(f"`{about['command']}`, {about['date']}, commit {about['commit']} and later,")
    print(f"{about['cores']} cores of {about['processor']}, {about['versions']}.\n")
    for name in dict.fromkeys(row["model"] for row in result["rows"]):
        print(f"## {name}\n")
        print(table([row for row in result["rows"] if row["model"] == name]) + "\n")


if __name__ == "__main__":
    main()
