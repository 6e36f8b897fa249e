"""Results of lm-evaluation-harness (0.4.13) as an entry of "policies" in results.json."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

PRIMARY = ("acc_norm", "exact_match", "acc", "pass@1", "f1", "word_perplexity")
"""The first of these metrics that a task has represents the task in the mean."""

LOW = ("perplexity", "bits_per_byte", "brier", "ter", "wer", "loss", "mse")
"""Parts of the names of metrics where lower is better, if the harness does not say so."""

NO_METRIC = ("sample_len", "bypass")


@dataclass(frozen=True)
class Part:
    """The score of one requested name.

    Attributes:
        label: the name and the metric.
        high: whether a higher score is better.
    """

    label: str
    metric: str
    high: bool
    score: float
    error: float | None
    items: int


def scores(
    found: Mapping[str, Any],
    requested: Mapping[str, Sequence[str]] | Sequence[str] | None = None,
) -> dict[str, Any]:
    """The harness's results as an entry of "policies".

    Each requested task, group or tag has one score, however many tasks are below it. A group's
    score is the harness's own aggregate. A group without an aggregate, and a tag, has the plain
    mean of its members, and its label says so.

    Args:
        found: the result of `lm_eval.simple_evaluate`.
        requested: names, each with its tasks where it is a tag, because the results do not name
            tags; None: all tasks and groups that are in no group.

    Returns:
        all: the mean over the requested names. Scores where lower is better, or that are
        not shares from 0 to 1, are left out of the mean and named under "not in the mean".
        groups: the score of each name. summary: every number of every task and group.

    Raises:
        ValueError: no scores at all.
    """
    # Members of a group are part of its score, so they are not requested again.
    inner = {child for children in found.get("group_subtasks", {}).values() for child in children}
    requested = requested or [name for name in found["results"] if name not in inner]
    names = requested if isinstance(requested, Mapping) else dict.fromkeys(requested, ())
    results = _Results(found, names)
    parts = [results.part(name) for name in names]
    known = [part for part in parts if part is not None]
    if not known:
        raise ValueError("lm-evaluation-harness gave no scores for these tasks")
    used = _comparable(known)
    # Whatever the mean leaves out is named, so that nobody takes it for part of the mean.
    apart = [part.label for part in known if part not in used]
    apart += [f"{name} (no score)" for name, part in zip(names, parts, strict=True) if not part]
    mean = _mean("all", used)
    return {
        "all": _entry(mean),
        "groups": {part.label: _entry(part) for part in known},
        "summary": results.numbers() | ({"not in the mean": ", ".join(apart)} if apart else {}),
    }


@dataclass(frozen=True)
class _Results:
    """The harness's results and the members of the tags."""

    found: Mapping[str, Any]
    tags: Mapping[str, Sequence[str]]

    def numbers(self) -> dict[str, float]:
        """Every metric of every task and group, and its standard error."""
        return {
            f"{name} {key.removesuffix(',none')}": value
            for name in self.found["results"]
            for key, value in self._values(name).items()
        }

    def part(self, name: str) -> Part | None:
        """The score of a task, group or tag; None where there is none."""
        values = self._values(name)
        metrics = [key for key in values if "_stderr" not in key]
        # The sort is stable, so the task's first filter counts where a metric has several.
        order = {metric: place for place, metric in enumerate(PRIMARY)}
        metrics.sort(key=lambda key: order.get(key.partition(",")[0], len(order)))
        if not metrics:
            members = [self.part(member) for member in self._members(name)]
            known = [part for part in members if part is not None]
            return _mean(name, _comparable(known)) if known else None
        # A key of the harness is METRIC,FILTER; the standard error's is METRIC_stderr,FILTER.
        metric, comma, filtered = metrics[0].partition(",")
        label = metrics[0].removesuffix(",none")
        return Part(
            label=f"{name} ({label})",
            metric=metric,
            high=self._is_high(name, metric),
            score=values[metrics[0]],
            error=values.get(f"{metric}_stderr{comma}{filtered}"),
            items=sum(self._count(leaf) for leaf in self._leaves(name)),
        )

    def _values(self, name: str) -> dict[str, float]:
        """The entry's finite metrics and standard errors, by keys such as "acc,none"."""
        entry = self.found["results"].get(name, {})
        return {
            key: float(value)
            for key, value in entry.items()
            if isinstance(value, Real)
            and not isinstance(value, bool)
            and math.isfinite(value)
            and key.partition(",")[0] not in NO_METRIC
        }

    def _members(self, name: str) -> Sequence[str]:
        return self.tags.get(name) or self.found.get("group_subtasks", {}).get(name) or ()

    def _leaves(self, name: str) -> Iterator[str]:
        members = self._members(name)
        if not members:
            yield name
        for member in members:
            yield from self._leaves(member)

    def _count(self, leaf: str) -> int:
        counted = self.found.get("n-samples", {}).get(leaf)
        if counted:
            return counted["effective"]
        return self.found["results"].get(leaf, {}).get("sample_len", 0)

    def _is_high(self, name: str, metric: str) -> bool:
        # The harness tells the direction of tasks and their groups, not of groups of groups.
        said = self.found.get("higher_is_better", {})
        known = [said.get(at, {}).get(metric) for at in (name, *self._leaves(name))]
        known = [value for value in known if value is not None]
        return known[0] if known else not any(part in metric for part in LOW)


def _comparable(parts: Sequence[Part]) -> list[Part]:
    """Parts whose mean makes sense: shares (higher is better), else parts of one metric."""
    shares = [part for part in parts if part.high and 0 <= part.score <= 1]
    return shares or [part for part in parts if part.metric == parts[0].metric]


def _mean(name: str, parts: Sequence[Part]) -> Part:
    """The mean of independent scores. Higher is better for all of them, or lower for all."""
    errors = [part.error for part in parts if part.error is not None]
    # Without the error of every member, the mean's error is unknown.
    complete = len(errors) == len(parts)
    metrics = list(dict.fromkeys(part.metric for part in parts))
    return Part(
        label=f"{name} ({'/'.join(metrics)}, mean of {len(parts)})",
        metric="/".join(metrics),
        high=parts[0].high,
        score=sum(part.score for part in parts) / len(parts),
        error=sum(error**2 for error in errors) ** 0.5 / len(parts) if complete else None,
        items=sum(part.items for part in parts),
    )


def _entry(part: Part) -> dict[str, Any]:
    return {"score": part.score, "standard_error": part.error, "items": part.items}
