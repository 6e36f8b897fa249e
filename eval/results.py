"""The content of results.json: scores and their errors, bytes of caches, model and machine.

{
  "task", "metric", "model", "protocol", "seed", "items",
  "prompt": "raw" or "chat", with the groups that stay raw in a run with --chat,
  "policies": [{
      "policy",
      "all": {"score", "standard_error", "items"},
      "groups": {group: the same},
      "cache_bytes", "full_cache_bytes", "gqa_cache_bytes",     # means over the items
      "kept": {bucket: [L][K] tokens},     # of a prompt that fills the bucket
      "kept_share": mean share of a prompt's tokens that a head keeps; protocol "generate" only
      "prompt_tokens": {"least", "mean", "most"}, "truncated",
      "summary": further numbers of the task,
  }],
  "seconds", "computed",     # of the last process: time, and answers that it computed
  "date", "device", "versions", "commit", "command"
}
"""

from __future__ import annotations

import json
import math
import platform
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eval.predictions import Prediction
from eval.prompts import Shape
from eval.task import Item, Task
from kvjax.config import GQAConfig, ModelConfig
from kvjax.generation import full_cache_bytes
from kvjax.hf import config_from_hf
from kvjax.identity import identity
from kvjax.nn import Transformer
from kvjax.policies.compression import kept_tokens as tokens_kept
from kvjax.policies.named import measurements_digest
from kvjax.policies.policy import Full, Policy
from kvjax.prefilling import bucket_length, shape_bytes

PACKAGES = ("kvjax", "jax", "jaxlib", "flax", "transformers", "numpy")


def statistics(scores: Sequence[float]) -> dict[str, Any]:
    """Mean, standard error and number of scores.

    The standard error is None for a single score.
    """
    error = standard_error(scores) if len(scores) > 1 else None
    return {"score": float(np.mean(scores)), "standard_error": error, "items": len(scores)}


def by_group(predictions: Sequence[Prediction]) -> dict[str, dict[str, Any]]:
    """`statistics` of each group, in order of first occurrence. Group "" is left out."""
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
        kept: bucket → tokens that each head keeps, see `kept_tokens`.
        gqa_bytes: bytes of each item's uncompressed cache before any conversion; empty: unknown.
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
    # Fed answers have no text that a task could summarize.
    if task.summary is not None and predictions[0].text is not None:
        triples = [(task_item, p.text or "", p.score) for task_item, p in _pairs(task, predictions)]
        result["summary"] = task.summary(triples)
    return result


def _pairs(task: Task, predictions: Sequence[Prediction]) -> list[tuple[Item, Prediction]]:
    items = {item.id: item for item in task.items}
    return [(items[prediction.id], prediction) for prediction in predictions]


def _mean(values: Sequence[int]) -> float:
    return float(np.mean(values))


def standard_error(scores: Sequence[float]) -> float:
    """Standard error of the mean of independent scores; nan for fewer than two.

    s / √n with s² = Σ(x − x̄)² / (n − 1).
    """
    if len(scores) < 2:
        return math.nan
    return float(np.std(scores, ddof=1)) / math.sqrt(len(scores))


@dataclass(frozen=True)
class McNemar:
    """The comparison of two methods on the same questions.

    Attributes:
        only_first: number of questions that only the first method got right.
        only_second: number of questions that only the second method got right.
        p_value: two-sided probability of a difference at least this large between equal methods.
    """

    only_first: int
    only_second: int
    p_value: float


def mcnemar(first: Sequence[bool | float], second: Sequence[bool | float]) -> McNemar:
    """McNemar's test in its exact binomial form.

    Questions that both or neither got right do not count. Each of the b + c others falls to either
    side with probability ½, so p = min(1, 2·P(X ≤ min(b, c))) with X ~ Binomial(b + c, ½)
    (McNemar 1947, Psychometrika 12; Fagerland et al. 2013, BMC Medical Research Methodology 13:91,
    eq. 2).

    Args:
        first, second: right or wrong (1 or 0) on each question, in the same order.

    Raises:
        ValueError: different lengths, or scores between 0 and 1.
    """
    if len(first) != len(second):
        raise ValueError(f"got {len(first)} and {len(second)} scores, expected the same questions")
    partial = [score for score in (*first, *second) if score not in (0, 1)]
    if partial:
        raise ValueError(f"got a score of {partial[0]}, expected 0 or 1")
    only_first = sum(a > b for a, b in zip(first, second, strict=True))
    only_second = sum(a < b for a, b in zip(first, second, strict=True))
    count = only_first + only_second
    # Whole numbers stay exact; floats would overflow for many questions.
    tail = sum(math.comb(count, i) for i in range(min(only_first, only_second) + 1))
    return McNemar(only_first, only_second, min(1.0, 2 * tail / 2**count))


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Probability that one of k samples, drawn without replacement, passes.

    1 − C(n − c, k) / C(n, k) = 1 − Π_{i=n−c+1..n} (1 − k/i), with n samples of which c passed
    (Chen et al. 2021, "Evaluating Large Language Models Trained on Code", section 2.1).

    Raises:
        ValueError: not 0 ≤ c ≤ n or not 1 ≤ k ≤ n.
    """
    if not 0 <= passed <= samples or not 1 <= k <= samples:
        raise ValueError(f"got n={samples}, c={passed}, k={k}; expected 0 ≤ c ≤ n and 1 ≤ k ≤ n")
    if samples - passed < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - passed + 1, samples + 1))


def policy_bytes(model: Transformer, dtype: Any, policy: Policy, shape: Shape) -> int:
    """Bytes of one sequence's caches after prefill, with room for the answer.

    Args:
        dtype: dtype of the parameters.
        policy: with its head scores, see `kvjax.policies.named.resolve`.
    """
    lengths, dtype = [shape.bucket], jnp.dtype(dtype)
    work = policy.compression(model.config, lengths, shape.max_new_tokens, dtype)
    return shape_bytes(work, bucket_length(shape.bucket))


def uncompressed_bytes(model: Transformer, dtype: Any, shape: Shape) -> int:
    """Bytes of one sequence's uncompressed caches."""
    # Only the parameters' dtype matters, so no parameters are made.
    params = {"embedding": jax.ShapeDtypeStruct((), jnp.dtype(dtype))}
    slots = bucket_length(shape.bucket)
    return full_cache_bytes(model, params, (1, slots), shape.max_new_tokens)


def gqa_bytes(model: Transformer, dtype: Any, shape: Shape) -> int | None:
    """`uncompressed_bytes` before any conversion; None for a model that never was GQA."""
    base = gqa_config(model.config)
    return None if base is None else uncompressed_bytes(Transformer(base), dtype, shape)


def gqa_config(config: ModelConfig) -> ModelConfig | None:
    """The model before its attention was converted; None where it never was GQA.

    A converted model keeps the attention that it was converted from, or the original config.json.
    """
    base = config.with_attention(tuple(layer.attention.unconverted for layer in config.layers))
    if not _is_gqa(base):
        # Converted attention may have lost its origin; the original config.json has it.
        raw = json.loads(config.hf_json)
        base = config_from_hf(raw) if raw else base
    return base if _is_gqa(base) else None


def kept_tokens(policy: Policy, config: ModelConfig, prompt_len: int, dtype: Any) -> Any:
    """[L][K] tokens that each head keeps of a prompt, the observed ones included; None: all.

    For policies with sharing, the budgets before the heads of a layer share them.
    """
    if isinstance(policy, Full):
        return None
    return policy.kept(config, prompt_len, jnp.dtype(dtype)).tolist()


def kept_share(policy: Policy, config: ModelConfig, lengths: Sequence[int], dtype: Any) -> float:
    """Mean share of a prompt's tokens that a head keeps, over heads and prompts."""
    if isinstance(policy, Full):
        return 1.0
    # Prompts of one length keep the same share, so each length is computed once.
    each, counts = np.unique(np.asarray(lengths), return_counts=True)
    work = policy.compression(config, each, 0, jnp.dtype(dtype))
    kept = tokens_kept(config, work.budgets, work.lengths).mean(axis=(1, 2))
    return float(np.average(kept / each, weights=counts))


def _is_gqa(config: ModelConfig) -> bool:
    return all(isinstance(layer.attention, GQAConfig) for layer in config.layers)


def facts(model: Transformer, params: Any, policies: Mapping[str, Policy]) -> dict[str, Any]:
    """Digests for config.json: a checkpoint or score file can change and keep its name."""
    found = identity(model.config, params)
    return {
        "config": found.config,
        "weights": found.digest,
        "dtype": found.dtype,
        "head_scores": score_digests(policies),
    }


def score_digests(policies: Mapping[str, Policy]) -> dict[str, str]:
    """Digests of the head scores or the curves of need, for each policy that has some."""
    found = {name: measurements_digest(policy) for name, policy in policies.items()}
    return {name: digest for name, digest in found.items() if digest}


def environment(argv: Sequence[str]) -> dict[str, Any]:
    """The entries of results.json about machine, software and command.

    Args:
        argv: arguments of `python -m eval`.
    """
    devices = jax.devices()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": f"{len(devices)} × {devices[0].device_kind}",
        "versions": {"python": platform.python_version()} | _versions(),
        "commit": commit(),
        "command": shlex.join(["python", "-m", "eval", *argv]),
    }


def commit() -> str | None:
    """The checked-out commit, with "+changes" where the code differs from it; None without git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    paths = [":/kvjax", ":/pallas_kernels", ":/eval"]
    try:
        head, changes = (
            subprocess.run([*git, *rest], capture_output=True, text=True, check=True).stdout
            for rest in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", *paths])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.strip() + ("+changes" if changes.strip() else "")


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
