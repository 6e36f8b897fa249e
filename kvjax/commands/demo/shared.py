"""What both pages of the demo share: steps with their seconds, comparisons, and pictures."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from kvjax.commands.checkpoints import count_parameters, describe_attention
from kvjax.example import Example
from kvjax.extras import pyplot
from kvjax.nn import Transformer
from kvjax.policies.importance import HeadScores
from kvjax.policies.named import resolve
from kvjax.policies.policy import Compress
from kvjax.progress import compile_spans, seconds
from kvjax.runs import write_json, write_picture
from kvjax.scoring import compare
from kvjax.tasks.words import TokenizerVocabulary

POLICIES = ("headkv", "snapkv", "streaming")
KEEPS = (
    "headkv gives each head a share by its importance, snapkv all heads the same, streaming keeps "
    "the first and the last tokens."
)
TITLES = {
    "builtin:smollm2": "SmolLM2-135M-Instruct",
    "builtin:needle": "the embedded model, which writes 512 words",
}


@dataclass(frozen=True)
class Subject:
    """The model that the demo shows.

    Attributes:
        name: as the user gave it.
        vocab: the tokenizer as the tasks read it, with the chat template if there is one.
    """

    name: str
    model: Transformer
    params: Any
    tokenizer: Any
    vocab: TokenizerVocabulary


def about(subject: Subject) -> str:
    """The model in a line."""
    config, dtype = subject.model.config, subject.params["embedding"].dtype
    kinds = ", ".join(sorted({describe_attention(layer.attention) for layer in config.layers}))
    return (
        f"{TITLES.get(subject.name, subject.name)}: "
        f"{count_parameters(subject.params):,} parameters, "
        f"{config.num_layers} layers, {kinds}; {dtype} on {jax.default_backend()}"
    )


class Steps:
    """Names each step of the demo and its seconds on standard error, and those of compiling."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the demo began."""
        return round(time.monotonic() - self.started, 1)

    @contextmanager
    def step(self, text: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """One step.

        Args:
            total: number of parts; None for a step that is not counted.

        Yields:
            A function that takes the number of finished parts.
        """
        terminal, start = self.console.is_terminal, time.monotonic()
        columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(20)
        bar = Progress(*columns, TimeElapsedColumn(), console=self.console, transient=True)
        bar.disable = not terminal
        # A log gets the name of the step at once, a terminal a moving line until the step ends.
        if not terminal:
            self.console.print(f"[{text} …", end=" ", markup=False)
        with compile_spans() as spans, bar:
            task = bar.add_task(text, total=total)
            yield lambda done: bar.update(task, completed=done)
        line = seconds(time.monotonic() - start, spans)
        self.console.print(f"[{text}: {line}]" if terminal else f"{line}]", markup=False)


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


def compare_policies(
    subject: Subject,
    scores: HeadScores,
    tasks: Mapping[str, Sequence[Example]],
    kv_sizes: Sequence[int],
    steps: Steps,
    batch_size: int = 16,
) -> dict[str, list[Outcome]]:
    """Each task's outcomes under the full cache and every policy at every KV size.

    Each prompt is read once for all of them.

    Args:
        tasks: equally many examples of each.
        scores: the importance of the model's heads.
        batch_size: examples at a time.
    """
    model, params = subject.model, subject.params
    examples = [example for group in tasks.values() for example in group]
    policies = policies_of(model, scores, kv_sizes)
    text = f"compile, then {len(examples)} prompts to {len(policies) + 1} caches"
    with steps.step(text, len(examples)) as at:
        compared = compare(model, params, examples, policies, batch_size=batch_size, on_batch=at)
    samples = len(examples) // len(tasks)
    outcomes: dict[str, list[Outcome]] = {task: [] for task in tasks}
    for policy, found in compared.right.items():
        for task, right in zip(tasks, found.reshape(-1, samples), strict=True):
            share = float(right.mean())
            error = float(np.sqrt(share * (1 - share) / samples))
            row = Outcome(policy, share, error, samples, compared.cache_bytes[policy])
            outcomes[task].append(row)
    return outcomes


def policies_of(
    model: Transformer, scores: HeadScores, kv_sizes: Sequence[int]
) -> dict[str, Compress]:
    """Every policy at every KV size, with these head scores."""
    names = [f"{name}:kv_size={size}" for size in kv_sizes for name in POLICIES]
    resolved = ((name, resolve(name, model.config, scores)) for name in names)
    return {name: policy for name, policy in resolved if isinstance(policy, Compress)}


def open_table(first: str, numbers: Sequence[str], title: str | None = None) -> Table:
    """A table without lines, which leaves room for more columns: a name, then numbers."""
    columns = Column(first, no_wrap=True), *(Column(name, justify="right") for name in numbers)
    return Table(*columns, title=title, title_justify="left", box=None, pad_edge=False)


def accuracy_table(outcomes: Mapping[str, Sequence[Outcome]], title: str) -> Table:
    """One row for each policy, one column for each task."""
    full = next(iter(outcomes.values()))[0]
    table = open_table("policy", ("KiB", "of full", *outcomes), title=title)
    for rows in zip(*outcomes.values(), strict=True):
        table.add_row(
            rows[0].policy,
            f"{rows[0].cache_bytes / 1024:,.0f}",
            f"{rows[0].cache_bytes / full.cache_bytes:.1%}",
            *(f"{o.accuracy:.2f} ± {o.standard_error:.2f}" for o in rows),
        )
    return table


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


def importance_line(importance: Mapping[str, Any]) -> str:
    """`describe_importance` as a sentence."""
    top = ", ".join(f"{h['layer']}-{h['head']} ({h['score']:.2f})" for h in importance["top"])
    share = importance["share_of_top"]
    return f"Most important heads (layer-head): {top}: {share:.0%} of all importance."


def finish(report: dict[str, Any], out: Path, steps: Steps, console: Console) -> dict[str, Any]:
    """Adds the seconds, writes report.json, and names the files that the demo wrote."""
    report = {**report, "seconds": steps.seconds}
    write_json(out / "report.json", report)
    pictures = ", ".join(sorted(path.name for path in out.glob("*.png")))
    console.print(f"{report['seconds']:.0f} s. {out}/: report.json, {pictures}")
    return report


def as_rows(outcomes: Mapping[str, Sequence[Outcome]]) -> dict[str, list[dict[str, Any]]]:
    """The outcomes for report.json."""
    return {task: [dataclasses.asdict(o) for o in rows] for task, rows in outcomes.items()}


def draw(
    outcomes: Mapping[str, Sequence[Outcome]], scores: HeadScores, length: int, out: Path
) -> None:
    """Draws heads.png, and accuracy_<task>.png for each task.

    Args:
        length: tokens of each prompt.
    """
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
        title = f"{task}, {length}-token prompts"
        picture = out / f"accuracy_{task}.png"
        plot_accuracy(curves, (full.cache_bytes, full.accuracy), title, picture)


def plot_head_importance(importance: np.ndarray, path: Path) -> None:
    """Draws a heat map of head importance [L, N]."""
    layers, heads = importance.shape
    size = 1.5 + min(0.45 * heads, 14), 1.2 + min(0.45 * layers, 8)
    figure, axes = pyplot().subplots(figsize=size, layout="constrained")
    image = axes.imshow(importance, aspect="auto", cmap="viridis")
    axes.set_xticks(range(heads))
    axes.set_yticks(range(layers))
    axes.set_xlabel("query head")
    axes.set_ylabel("layer")
    axes.set_title("Head importance")
    figure.colorbar(image, ax=axes)
    write_picture(path, figure, dpi=150)


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
    figure, axes = pyplot().subplots(figsize=(6.0, 4.0), layout="constrained")
    for marker, (label, points) in zip("osD^v", curves.items(), strict=False):
        size, accuracy, error = np.array(sorted(points)).T
        axes.errorbar(size / 1024, accuracy, error, marker=marker, capsize=3, label=label)
    axes.axhline(full[1], color="grey", linestyle="--", label=f"full ({full[0] / 1024:,.0f} KiB)")
    axes.set_xscale("log")
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("cache a sequence (KiB, log scale)")
    axes.set_ylabel("exact match")
    axes.set_title(title)
    axes.legend()
    write_picture(path, figure, dpi=150)
