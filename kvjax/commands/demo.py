"""`kvjax demo`: accuracy against cache bytes on the embedded model, in a few minutes.

The demo measures head importance, answers questions under every policy, converts the model to an
equal cache, and writes report.json and pictures.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table

from kvjax.checks import COUNT, SEED, check_ranges
from kvjax.commands.checkpoints import bytes_per_token, logit_change
from kvjax.extras import pyplot
from kvjax.headkv.measure import score_heads
from kvjax.hf import load, load_tokenizer
from kvjax.policies.importance import HeadScores
from kvjax.policies.named import resolve
from kvjax.policies.policy import Compress
from kvjax.runs import write_json
from kvjax.scoring import Compared, compare
from kvjax.tasks import make_examples
from kvjax.tasks.words import TokenizerVocabulary
from kvjax.text import has_chat_template
from kvjax.transmla import convert

MODEL = "builtin:needle"
PROMPT_LENGTH = 1024  # tokens of each question's prompt
SCORE_LENGTH = 512  # tokens of the longest prompt that head importance is measured on
TASKS = ("needle", "multi_key", "two_hop")
POLICIES = ("headkv", "snapkv", "streaming")
KV_SIZES = (16, 32, 64)
INITS = ("svd_global", "identity")


def run_demo(out: Path, samples: int, seed: int) -> dict[str, Any]:
    """Runs every part, prints one page, and writes report.json and pictures into `out`.

    Args:
        samples: examples per task; each policy at each size answers all of them.
        seed: of the examples.

    Returns:
        The content of report.json.

    Raises:
        ValueError: fewer than one sample, a negative seed, or matplotlib is not installed.
    """
    check_ranges({"samples": samples, "seed": seed}, {"samples": COUNT, "seed": SEED})
    pyplot()
    start = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    model, params = load(MODEL, dtype="float32")
    tokenizer = load_tokenizer(MODEL)
    vocab = TokenizerVocabulary(tokenizer, has_chat_template(tokenizer))
    examples = [
        example
        for task in TASKS
        for example in make_examples(task, vocab, samples, PROMPT_LENGTH, seed)
    ]
    # Head importance first: the policies share their budgets by it.
    with Progress(transient=True) as progress:
        steps = progress.add_task("head importance", total=2 + len(examples))
        scores = score_heads(model, params, tokenizer, samples=samples, length=SCORE_LENGTH)
        scores.save(out / "heads.json")
        progress.update(steps, completed=1, description="policies on the same prompts")
        compared = compare(
            model,
            params,
            examples,
            policies_of(model, scores),
            on_batch=lambda done: progress.update(steps, completed=1 + done),
        )
        outcomes = by_task(compared, samples)
        progress.update(steps, description="equal_cache conversion")
        conversions = [convert_and_compare(model, params, init) for init in INITS]
        progress.advance(steps)
    report = {
        "model": MODEL,
        "prompt_length": PROMPT_LENGTH,
        "seed": seed,
        "tasks": {task: [dataclasses.asdict(o) for o in rows] for task, rows in outcomes.items()},
        "importance": describe_importance(scores),
        "equal_cache": conversions,
        "seconds": round(time.monotonic() - start, 1),
    }
    write_json(out / "report.json", report)
    draw(outcomes, scores, out)
    print_page(outcomes, report, out)
    return report


@dataclass(frozen=True)
class Outcome:
    """The result of a policy on one task.

    Attributes:
        policy: its name and settings.
        accuracy, standard_error: share of the answers that are right in every token.
        items: number of examples.
        cache_bytes: per sequence, after prefill.
    """

    policy: str
    accuracy: float
    standard_error: float
    items: int
    cache_bytes: int


def policies_of(model: Any, scores: HeadScores) -> dict[str, Compress]:
    """Every policy at every KV size, with the scores that were just measured."""
    names = [f"{name}:kv_size={size}" for size in KV_SIZES for name in POLICIES]
    resolved = ((name, resolve(name, model.config, scores)) for name in names)
    return {name: policy for name, policy in resolved if isinstance(policy, Compress)}


def by_task(compared: Compared, samples: int) -> dict[str, list[Outcome]]:
    """Each task's outcomes. The examples of a task follow each other, `samples` of them."""
    outcomes: dict[str, list[Outcome]] = {}
    for index, task in enumerate(TASKS):
        outcomes[task] = []
        for policy, found in compared.right.items():
            share = float(found[index * samples : (index + 1) * samples].mean())
            error = float(np.sqrt(share * (1 - share) / samples))
            row = Outcome(policy, share, error, samples, compared.cache_bytes[policy])
            outcomes[task].append(row)
    return outcomes


def convert_and_compare(model: Any, params: Any, init: str) -> dict[str, Any]:
    """Converts to an equal cache and measures the change, which is rounding only."""
    new_model, new_params = convert(model, params, method="equal_cache", init=init)
    return {
        "init": init,
        "relative_logit_change": logit_change(model, params, new_model, new_params),
        "bytes_per_token_before": bytes_per_token(model, "float32"),
        "bytes_per_token_after": bytes_per_token(new_model, "float32"),
    }


def describe_importance(scores: HeadScores) -> dict[str, Any]:
    """The five most important heads, and the number of examples that the model answered."""
    mean = scores.mean
    best = np.argsort(mean, axis=None)[::-1][:5]
    heads = [tuple(int(i) for i in np.unravel_index(index, mean.shape)) for index in best]
    return {
        "accepted": scores.samples.shape[2],
        "top": [{"layer": i, "head": j, "score": float(mean[i, j])} for i, j in heads],
        "share_of_top": float(sum(mean[head] for head in heads) / mean.sum()),
    }


def draw(outcomes: dict[str, list[Outcome]], scores: HeadScores, out: Path) -> None:
    """Draws heads.png, and accuracy_<task>.png for each task."""
    plot_head_importance(scores.mean, out / "heads.png")
    for task, (full, *rest) in outcomes.items():
        curves = {
            name: [
                (o.cache_bytes, o.accuracy, o.standard_error)
                for o in rest
                if o.policy.startswith(name)
            ]
            for name in POLICIES
        }
        title = f"{task}, {PROMPT_LENGTH}-token prompts"
        picture = out / f"accuracy_{task}.png"
        plot_accuracy(curves, (full.cache_bytes, full.accuracy), title, picture)


def print_page(outcomes: dict[str, list[Outcome]], report: dict[str, Any], out: Path) -> None:
    """Prints the results on one page of the terminal."""
    console = Console()
    full = next(iter(outcomes.values()))[0]
    title = f"{MODEL}: exact match at {PROMPT_LENGTH} tokens"
    policy = Column("policy", no_wrap=True)
    table = Table(policy, "cache, KiB", "of full", *outcomes, title=title)
    for rows in zip(*outcomes.values(), strict=True):
        table.add_row(
            rows[0].policy,
            f"{rows[0].cache_bytes / 1024:.0f}",
            f"{rows[0].cache_bytes / full.cache_bytes:.1%}",
            *(f"{o.accuracy:.2f} ± {o.standard_error:.2f}" for o in rows),
        )
    console.print(table)
    importance = report["importance"]
    top = ", ".join(f"{h['layer']}-{h['head']} ({h['score']:.2f})" for h in importance["top"])
    console.print(
        f"Most important heads (layer-head): {top}: "
        f"{importance['share_of_top']:.0%} of all importance."
    )
    for row in report["equal_cache"]:
        console.print(
            f"equal_cache, {row['init']}: logits change by {row['relative_logit_change']:.1e} of "
            f"the largest; cache {row['bytes_per_token_before']} → "
            f"{row['bytes_per_token_after']} bytes per token."
        )
    pictures = ", ".join(sorted(path.name for path in out.glob("*.png")))
    console.print(f"{report['seconds']:.0f} s. {out}/: report.json, heads.json, {pictures}")


def _figure(width: float, height: float):
    return pyplot().subplots(figsize=(width, height), layout="constrained")


def _finish(figure, path: Path) -> None:
    figure.savefig(path, dpi=150)
    pyplot().close(figure)


def plot_head_importance(importance: np.ndarray, path: Path) -> None:
    """Draws a heat map of head importance [L, N]."""
    layers, heads = importance.shape
    figure, axes = _figure(1.5 + 0.45 * heads, 1.2 + 0.45 * layers)
    image = axes.imshow(importance, aspect="auto", cmap="viridis")
    axes.set_xticks(range(heads))
    axes.set_yticks(range(layers))
    axes.set_xlabel("query head")
    axes.set_ylabel("layer")
    axes.set_title("Head importance")
    figure.colorbar(image, ax=axes)
    _finish(figure, path)


def plot_accuracy(
    curves: Mapping[str, Sequence[tuple[int, float, float]]],
    full: tuple[int, float],
    title: str,
    path: Path,
) -> None:
    """Draws accuracy against cache bytes, one line per policy.

    Args:
        curves: (cache bytes, accuracy, standard error) points by label.
        full: bytes and accuracy of the full cache, drawn as a horizontal line.
    """
    figure, axes = _figure(6.0, 4.0)
    for marker, (label, points) in zip("osD^v", curves.items(), strict=False):
        size, accuracy, error = np.array(sorted(points)).T
        axes.errorbar(size / 1024, accuracy, error, marker=marker, capsize=3, label=label)
    axes.axhline(full[1], color="grey", linestyle="--", label=f"full ({full[0] / 1024:.0f} KiB)")
    axes.set_xscale("log")
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("cache a sequence (KiB, log scale)")
    axes.set_ylabel("exact match")
    axes.set_title(title)
    axes.legend()
    _finish(figure, path)
