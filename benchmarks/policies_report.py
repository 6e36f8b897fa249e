"""Table and picture of a result of `benchmarks.policies`.

python -m benchmarks.policies_report [benchmarks/results/policies.json]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.policies import label
from kvjax.extras import pyplot
from kvjax.paths import local_path
from kvjax.scoring import FULL

RESULT = Path("benchmarks/results/policies.json")
PICTURE = Path("docs/figures/policies.png")
REFERENCE = "headkv"


def main() -> None:
    path = local_path(sys.argv[1]) if len(sys.argv) > 1 else RESULT
    result = json.loads(path.read_text())
    table = path.with_suffix(".md")
    table.write_text("\n".join(page(result)) + "\n")
    draw(result, PICTURE)
    print(f"written: {table}, {PICTURE}")


def outcomes(result: dict[str, Any], protocol: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What each item is, and which items each policy got right, over all seeds."""
    parts = [part for key, part in result["parts"].items() if key.split()[0] == protocol]
    kinds = np.concatenate([part["kinds"] for part in parts])
    names = parts[0]["right"]
    right = {
        name: np.concatenate([[bit == "1" for bit in part["right"][name]] for part in parts])
        for name in names
    }
    return kinds, right


def page(result: dict[str, Any]) -> list[str]:
    """The tables, in Markdown."""
    settings, full = result["settings"], result["bytes"][FULL]
    lines = [
        "# Policies on the embedded model",
        "",
        f"`{result['command']}` on {result['date']}: {result['model']}, prompts of "
        f"{result['length']} tokens, {len(settings['seeds'])} seeds of {settings['prompts']} "
        f"prompts for each protocol; {result['seconds'] / 60:.0f} min on {result['cores']} cores "
        f"({result['processor']}, load {result['load_average'][0]:.1f}), "
        f"jax {result['versions']['jax']}, commit {result['commit']}.",
        "",
        f"Share of answers right in every token, in percent; the full cache has {full} bytes. Last "
        f"column: {REFERENCE} minus the policy over the same prompts, ± one standard error.",
    ]
    for protocol in settings["protocols"]:
        kinds, right = outcomes(result, protocol)
        title = "part of the compressed prompt" if protocol == "inside" else "asked afterwards"
        groups = sorted(set(kinds))
        lines += ["", f"## The question is {title} ({len(kinds)} prompts)", ""]
        lines += [f"| KV size | policy | KiB | {' | '.join(groups)} | all | {REFERENCE} − policy |"]
        lines += ["|" + "---|" * (len(groups) + 5)]
        lines += [row("", FULL, right[FULL], kinds, groups, full, "")]
        for size in settings["sizes"]:
            reference = right[label(REFERENCE, size)]
            for name in settings["policies"]:
                found = right[label(name, size)]
                nbytes = result["bytes"][label(name, size)]
                paired = "" if name == REFERENCE else difference(reference, found)
                lines.append(row(str(size), name, found, kinds, groups, nbytes, paired))
    return lines


def row(
    size: str,
    name: str,
    found: np.ndarray,
    kinds: np.ndarray,
    groups: list[str],
    nbytes: int,
    paired: str,
) -> str:
    """One line of a table."""
    cells = [f"{100 * found[kinds == group].mean():.0f}" for group in groups]
    cells = [size, name, f"{nbytes / 1024:.0f}", *cells, f"{100 * found.mean():.1f}", paired]
    return f"| {' | '.join(cells)} |"


def difference(reference: np.ndarray, found: np.ndarray) -> str:
    """Mean of the paired differences ± its standard error, in points."""
    paired = 100 * (reference.astype(float) - found.astype(float))
    return f"{paired.mean():+.1f} ± {paired.std(ddof=1) / np.sqrt(len(paired)):.1f}"


def draw(result: dict[str, Any], path: Path) -> None:
    """Accuracy against KV size: a row a protocol, a column a task."""
    settings = result["settings"]
    tasks = sorted({kind.split()[0] for part in result["parts"].values() for kind in part["kinds"]})
    shape = (len(settings["protocols"]), len(tasks))
    figure, grid = pyplot().subplots(
        *shape, figsize=(4 * shape[1], 3.2 * shape[0]), sharey=True, layout="constrained"
    )
    grid = np.asarray(grid).reshape(shape)
    for protocol, axes_row in zip(settings["protocols"], grid, strict=True):
        kinds, right = outcomes(result, protocol)
        of_task = np.asarray([kind.split()[0] for kind in kinds])
        for task, axes in zip(tasks, axes_row, strict=True):
            items = of_task == task
            for index, name in enumerate(settings["policies"]):
                values = [right[label(name, size)][items].mean() for size in settings["sizes"]]
                style: dict[str, Any] = {"color": pyplot.get_cmap("tab20")(index % 20)}
                if name == REFERENCE:
                    style = {"linewidth": 2.5, "color": "black"}
                marker = "osD^v<>pP*Xhd"[index % 13]
                axes.plot(settings["sizes"], values, marker=marker, ms=4, label=name, **style)
            axes.axhline(right[FULL][items].mean(), color="grey", linestyle="--", label=FULL)
            axes.set_xscale("log")
            axes.set_xticks(settings["sizes"], [str(size) for size in settings["sizes"]])
            axes.minorticks_off()
            axes.set_title(f"{task}, question {protocol}")
            axes.set_xlabel("KV size (tokens a head)")
    grid[0, 0].set_ylabel("exact match")
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
