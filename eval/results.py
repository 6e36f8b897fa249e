"""What a run reports: results.json, made from its predictions.

{
  "task", "metric", "model", "protocol", "seed", "items",
  "prompt": "raw" or "chat", and which groups stay raw in a run with --chat,
  "policies": [{
      "policy",
      "all": {"score", "standard_error", "items"},
      "groups": {group: the same},
      "cache_bytes", "full_cache_bytes", "gqa_cache_bytes",     # means over the items
      "kept": {bucket: [L][K] tokens},     # of a prompt that fills it, where the policy gives them
      "kept_share": mean share of a prompt's tokens that a head keeps; of protocol "generate"
      "prompt_tokens": {"least", "mean", "most"}, "truncated",
      "summary": the task's own numbers, if it has some,
  }],
  "seconds", "computed",     # of the process that finished the run; items of all policies
  "date", "device", "versions", "commit", "command"
}
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from eval.predictions import Prediction
from eval.task import Item, Task


def statistics(scores: Sequence[float]) -> dict[str, Any]:
    """Mean, standard error and number of scores.

    The standard error is the sample's standard deviation (n − 1) over √n; None for one item.
    """
    n = len(scores)
    error = float(np.std(scores, ddof=1)) / math.sqrt(n) if n > 1 else None
    return {"score": float(np.mean(scores)), "standard_error": error, "items": n}


def by_group(predictions: Sequence[Prediction]) -> dict[str, dict[str, Any]]:
    """`statistics` of each group, in the order in which they come; empty names are no group."""
    groups: dict[str, list[float]] = {}
    for prediction in predictions:
        if prediction.group:
            groups.setdefault(prediction.group, []).append(prediction.score)
    return {name: statistics(scores) for name, scores in groups.items()}


def of_policy(
    task: Task, predictions: Sequence[Prediction], kept: dict[str, Any], gqa_bytes: Sequence[int]
) -> dict[str, Any]:
    """One entry of "policies".

    Args:
        predictions: of one policy, in the order of the task's items.
        kept: bucket → tokens of each head; empty where the policy does not say.
        gqa_bytes: of each item, the uncompressed cache before any conversion; empty: unknown.
    """
    tokens = [prediction.prompt_tokens for prediction in predictions]
    result = {
        "policy": predictions[0].policy,
        "all": statistics([prediction.score for prediction in predictions]),
        "groups": by_group(predictions),
        "cache_bytes": _mean([prediction.cache_bytes for prediction in predictions]),
        "full_cache_bytes": _mean([prediction.full_cache_bytes for prediction in predictions]),
        "gqa_cache_bytes": _mean(gqa_bytes) if len(gqa_bytes) else None,
        "kept": kept,
        "prompt_tokens": {"least": min(tokens), "mean": _mean(tokens), "most": max(tokens)},
        "truncated": sum(prediction.truncated for prediction in predictions),
    }
    if task.summary is not None and predictions[0].text is not None:
        triples = [(task_item, p.text or "", p.score) for task_item, p in _pairs(task, predictions)]
        result["summary"] = task.summary(triples)
    return result


def _pairs(task: Task, predictions: Sequence[Prediction]) -> list[tuple[Item, Prediction]]:
    items = {item.id: item for item in task.items}
    return [(items[prediction.id], prediction) for prediction in predictions]


def _mean(values: Sequence[int]) -> float:
    return float(np.mean(values))
