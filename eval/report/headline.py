"""A run in one sentence: how much of the full cache's score is left in how many bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from eval.report.runs import Run

FULL = "full"
KEPT = 0.9
"""The sentence is about the smallest size at which a policy keeps this share of the score."""
LOSSES = ("perplexity", "loss")
"""Metrics of which less is better."""
OTHERS = 3


def headline(run: Run) -> str | None:
    """The sentence; None for runs without a full cache, or without a smaller one.

    Policies are compared that have the same settings, and so the same number of tokens.
    """
    full = next((entry for entry in run.policies if entry["policy"] == FULL), None)
    sizes: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for entry in run.policies:
        held = share_of_full(entry)
        if entry is not full and held is not None and held < 1:
            sizes[entry["policy"].partition(":")[2]].append(entry)
    if full is None or not sizes or full["all"]["score"] <= 0:
        return None
    less = any(word in str(run.results.get("metric")) for word in LOSSES)
    whole = full["all"]["score"]

    def kept(entry: Mapping[str, Any]) -> float:
        score = max(entry["all"]["score"], 1e-9)
        return whole / score if less else score / whole

    # The best policy of each size, the smallest size first.
    ranked = [sorted(each, key=kept, reverse=True) for each in sizes.values()]
    ranked.sort(key=lambda entries: share_of_full(entries[0]) or 0)
    good = [entries for entries in ranked if kept(entries[0]) >= KEPT]
    chosen = good[0] if good else max(ranked, key=lambda entries: kept(entries[0]))
    return _perplexities(full, chosen) if less else _shares(chosen, [kept(e) for e in chosen])


def _shares(entries: Sequence[Mapping[str, Any]], kept: Sequence[float]) -> str:
    first, *others = (
        (entry["policy"].partition(":")[0], f"{max(part, 0):.0%}")
        for entry, part in zip(entries, kept, strict=True)
    )
    held = share(share_of_full(entries[0]) or 0)
    said = f"{first[0]} keeps {first[1]} of the full cache's score in {held} of its bytes"
    rest = ", ".join(f"{name} {part}" for name, part in others[:OTHERS])
    return f"{said}; {rest}." if rest else f"{said}."


def _perplexities(full: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> str:
    first, *others = (
        (entry["policy"].partition(":")[0], f"{entry['all']['score']:.3g}") for entry in entries
    )
    held = share(share_of_full(entries[0]) or 0)
    said = f"{first[0]} has {first[1]} in {held} of the full cache's bytes, which has "
    rest = "".join(f"; {name} {score}" for name, score in others[:OTHERS])
    return f"{said}{full['all']['score']:.3g}{rest}."


def share_of_full(entry: Mapping[str, Any], whole: str = "full_cache_bytes") -> float | None:
    """The cache's bytes as a share of the full cache's; None where either is unknown."""
    held, full = entry.get("cache_bytes"), entry.get(whole)
    return held / full if held and full else None


def share(value: float) -> str:
    """A share in percent, with a decimal below ten."""
    return f"{value:.1%}" if value < 0.1 else f"{value:.0%}"
