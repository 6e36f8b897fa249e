"""Policies by name: a typed maker for each published method, and the strings that name them.

>>> policies.snapkv(kv_size=64)                      # in code
>>> parse_policy("snapkv:kv_size=64")                # on the command line
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Sequence
from typing import Any, TypedDict, TypeVar, Unpack

from kvjax.checks import shown
from kvjax.config import ModelConfig
from kvjax.identity import array_digest
from kvjax.policies.budgets import Adaptive, Allocator, HeadImportance, Pyramid, Uniform
from kvjax.policies.importance import HeadScores, check_shape, default_scores, load_scores
from kvjax.policies.need import MeasuredNeed, NeedCurves, check_curves, load_need
from kvjax.policies.observers import ColumnSums, ExpectedAttention
from kvjax.policies.policy import Compress, Full, Policy
from kvjax.policies.scorers import (
    KeyDifference,
    KeyNorm,
    LastQuery,
    ObservationWindow,
    Scorer,
    SinksAndRecent,
    SpanWindow,
)

Kind = TypeVar("Kind")


class Settings(TypedDict, total=False):
    """Settings of every policy that compresses; `Compress` explains them."""

    kv_size: int
    ratio: float
    nbytes: int
    observed: int
    entries: str
    ring: int
    compression_interval: int


def full(entries: str = "") -> Full:
    """Keeps everything: the uncompressed cache; see `Full`."""
    return Full(entries)


def streaming(n_sink: int = 4, **settings: Unpack[Settings]) -> Compress:
    """StreamingLLM (arXiv 2309.17453): keeps the first and the last tokens, in every head."""
    return _compress(Uniform(), SinksAndRecent(n_sink), settings)


def snapkv(kernel_size: int = 7, **settings: Unpack[Settings]) -> Compress:
    """SnapKV (arXiv 2404.14469): keeps what the last queries attend to, equally many per head."""
    return _compress(Uniform(), ObservationWindow(kernel_size), settings)


def spankv(
    ahead: int = 8,
    behind: int = 1,
    queries: int = 16,
    fade: float = 0.9,
    **settings: Unpack[Settings],
) -> Compress:
    """Equal budgets with headkv's choice of tokens (see `SpanWindow`)."""
    return _compress(Uniform(), SpanWindow(ahead, behind, queries, fade), settings)


def pyramidkv(kernel_size: int = 7, beta: float = 20.0, **settings: Unpack[Settings]) -> Compress:
    """PyramidKV (arXiv 2406.02069): SnapKV with more tokens in the lower layers."""
    return _compress(Pyramid(beta), ObservationWindow(kernel_size), settings)


def adasnapkv(kernel_size: int = 7, alpha: float = 0.2, **settings: Unpack[Settings]) -> Compress:
    """Ada-SnapKV (arXiv 2407.11550): the heads of a layer share its budget by their scores."""
    return _compress(Uniform(), ObservationWindow(kernel_size), settings, sharing=Adaptive(alpha))


def h2o(recent_share: float = 0.5, **settings: Unpack[Settings]) -> Compress:
    """H2O (arXiv 2306.14048): tokens that all queries attend to, and equally many recent ones."""
    return _compress(Uniform(), ColumnSums(), settings, recent_share=recent_share)


def tova(**settings: Unpack[Settings]) -> Compress:
    """TOVA (arXiv 2401.06104): what the last query attends to, the same in all heads of a layer."""
    return _compress(Uniform(), LastQuery(), settings)


def knorm(**settings: Unpack[Settings]) -> Compress:
    """KNorm (arXiv 2406.11430): keeps keys of small norm."""
    return _compress(Uniform(), KeyNorm(), settings)


def keydiff(**settings: Unpack[Settings]) -> Compress:
    """KeyDiff (arXiv 2504.15364): keeps keys that differ from the others."""
    return _compress(Uniform(), KeyDifference(), settings)


def expected(future: int = 512, **settings: Unpack[Settings]) -> Compress:
    """Expected Attention (arXiv 2510.00636): what future queries are expected to attend to."""
    return _compress(Uniform(), ExpectedAttention(future), settings)


def headkv(
    ahead: int = 8,
    behind: int = 1,
    queries: int = 16,
    fade: float = 0.9,
    beta: float = 0.0,
    scores: str | HeadScores = "",
    need: str | NeedCurves = "",
    **settings: Unpack[Settings],
) -> Compress:
    """HeadKV (arXiv 2410.19258), with the variants that measured better than the paper's rules.

    Head importance divides the budgets above a growing floor (`growing_beta`); `SpanWindow` rates
    the tokens.

    Args:
        ahead, behind, queries, fade: see `SpanWindow`.
        beta: 0 for `growing_beta`.
        scores: head scores of any estimator, or their file; empty for the model's own.
        need: `NeedCurves`, or their file; budgets are then the mean of those from importance and
            those from the curves, or from the curves alone for a model without head scores.
    """
    importance = HeadImportance(beta or None, _given(scores, HeadScores, load_scores))
    curves = _given(need, NeedCurves, load_need)
    allocator = importance if curves is None else MeasuredNeed(curves, importance)
    return _compress(allocator, SpanWindow(ahead, behind, queries, fade), settings)


def headkv_paper(
    kernel_size: int = 7,
    beta: float = 1.2,
    scores: str | HeadScores = "",
    **settings: Unpack[Settings],
) -> Compress:
    """HeadKV by the paper's rules: a fixed β, and SnapKV's choice of tokens.

    With scores of the estimator "retrieval" this is HeadKV-R, with "retrieval_reasoning" HeadKV-R2.
    Budgets and tokens are chosen per KV head; the published code chooses them per query head.
    """
    importance = HeadImportance(beta, _given(scores, HeadScores, load_scores))
    return _compress(importance, ObservationWindow(kernel_size), settings)


def headkv_adaptive(
    ahead: int = 8,
    behind: int = 1,
    queries: int = 16,
    fade: float = 0.9,
    beta: float = 0.0,
    alpha: float = 0.2,
    scores: str | HeadScores = "",
    **settings: Unpack[Settings],
) -> Compress:
    """`headkv` whose heads share a layer's budget by their token scores, as in Ada-KV."""
    importance = HeadImportance(beta or None, _given(scores, HeadScores, load_scores))
    scorer = SpanWindow(ahead, behind, queries, fade)
    return _compress(importance, scorer, settings, sharing=Adaptive(alpha))


def _compress(allocator: Allocator, scorer: Scorer, settings: Settings, **rest: Any) -> Compress:
    """The policy; with `ratio` or `nbytes` the default `kv_size` does not apply."""
    given = dict(settings)
    # 0 means no kv_size: the default of `Compress` would contradict the other size.
    if "ratio" in given or "nbytes" in given:
        given.setdefault("kv_size", 0)
    return Compress(allocator, scorer, **rest, **given)  # type: ignore[arg-type]


def _given(value: Any, kind: type[Kind], read: Callable[[str], Kind]) -> Kind | None:
    """The measurement that a maker was given, or whose file it was given; None for ""."""
    if isinstance(value, kind):
        return value
    return None if isinstance(value, str) and not value else read(value)


MAKERS: dict[str, Callable[..., Policy]] = {
    maker.__name__: maker
    for maker in (
        full,
        streaming,
        snapkv,
        spankv,
        pyramidkv,
        adasnapkv,
        h2o,
        tova,
        knorm,
        keydiff,
        expected,
        headkv,
        headkv_paper,
        headkv_adaptive,
    )
}

PARAMETERS = {"bytes": "nbytes"}
"""Setting names in a policy string whose maker parameter has a different name."""

RENAMED = {
    "window": "observed",
    "pool": "kernel_size",
    "sinks": "n_sink",
    "recent": "recent_share",
    "every": "compression_interval",
}
"""Setting names of earlier releases, which policy strings may still use."""


def parse_policy(policy: str | Policy) -> Policy:
    """Parses a policy string such as "headkv:kv_size=128,beta=1.2,scores=heads.json".

    Args:
        policy: the string; a `Policy` is returned unchanged.

    Raises:
        ValueError: an unknown name or setting, or a value of the wrong type or out of range.
    """
    if isinstance(policy, Policy):
        return policy
    if not isinstance(policy, str):
        raise ValueError(
            f"policy is {shown(policy)}, expected a text such as 'snapkv:kv_size=128', or a policy "
            "that a function of kvjax.policies returns"
        )
    name, _, settings = policy.partition(":")
    if name not in MAKERS:
        raise ValueError(f"policy {name!r} is not one of {', '.join(MAKERS)}")
    values = _read(name, settings, _kinds(MAKERS[name]))
    return MAKERS[name](**{PARAMETERS.get(key, key): value for key, value in values.items()})


def _kinds(maker: Callable[..., Policy]) -> dict[str, type]:
    """The settings of a maker by their names in a policy string, with the type of each."""
    own = typing.get_type_hints(maker)
    names = {parameter: name for name, parameter in PARAMETERS.items()}
    kinds: dict[str, type] = {}
    for parameter in inspect.signature(maker).parameters.values():
        # `**settings` stands for the common settings; the maker's own settings take precedence.
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            common = typing.get_type_hints(Settings)
            kinds = {names.get(key, key): kind for key, kind in common.items()} | kinds
        else:
            # What may also be an object in code is a text here: the first of the types.
            kind = own[parameter.name]
            kinds[parameter.name] = (*typing.get_args(kind), kind)[0]
    return kinds


def _read(name: str, settings: str, kinds: dict[str, type]) -> dict[str, Any]:
    """The values in "key=value,key=value"."""
    values = {}
    for setting in filter(None, settings.split(",")):
        key, equals, value = setting.partition("=")
        key = RENAMED.get(key, key)
        if key not in kinds or not equals:
            expected = ", ".join(f"{k}=…" for k in kinds)
            raise ValueError(f"policy {name!r}: {setting!r} is not understood, expected {expected}")
        if key in values:
            raise ValueError(f"policy {name!r}: {key} is given twice, expected once")
        try:
            values[key] = kinds[key](value)
        except ValueError:
            wanted = "a whole number" if kinds[key] is int else "a number"
            raise ValueError(f"policy {name!r}: {key} is {value!r}, expected {wanted}") from None
    return values


def resolve(policy: str | Policy, config: ModelConfig, scores: HeadScores | None) -> Policy:
    """A policy ready for this model: parsed, with head scores if it needs them.

    Args:
        scores: the model's own scores, for a policy without scores.

    Raises:
        ValueError: an unknown policy, no scores, or scores of a model of another shape.
    """
    policy = parse_policy(policy)
    if not isinstance(policy, Compress):
        return policy
    allocator = policy.allocator
    if isinstance(allocator, HeadImportance):
        allocator = _with_scores(allocator, config, scores)
    elif isinstance(allocator, MeasuredNeed):
        check_curves(allocator.curves, config)
        importance = allocator.importance
        if importance is not None:
            lacking = importance.scores is None and scores is None
            importance = None if lacking else _with_scores(importance, config, scores)
        allocator = dataclasses.replace(allocator, importance=importance)
    else:
        return policy
    return dataclasses.replace(policy, allocator=allocator)


def _with_scores(
    importance: HeadImportance, config: ModelConfig, scores: HeadScores | None
) -> HeadImportance:
    """The allocator with its own scores, or else the model's."""
    chosen = importance.scores or scores
    if chosen is None:
        raise ValueError(
            "the headkv policy needs head scores and this model has none: make them with "
            "`kvjax score MODEL heads.json`, then pass scores=heads.json"
        )
    check_shape(chosen, config)
    return dataclasses.replace(importance, scores=chosen)


def resolve_each(policies: Sequence[str | Policy], config: ModelConfig) -> list[Policy]:
    """Policies ready for this model. Reads the model's own head scores if a policy needs them.

    Raises:
        ValueError: see `resolve`.
    """
    parsed = [parse_policy(policy) for policy in policies]
    allocators = [policy.allocator for policy in parsed if isinstance(policy, Compress)]
    allocators = [a.importance if isinstance(a, MeasuredNeed) else a for a in allocators]
    # A damaged head_scores.json must not stop policies that never read it.
    lacking = any(isinstance(a, HeadImportance) and a.scores is None for a in allocators)
    scores = default_scores(config) if lacking else None
    return [resolve(policy, config, scores) for policy in parsed]


def measurements_digest(policy: Policy) -> str:
    """A digest of the head scores and the curves of need in a policy; empty for none.

    A file keeps its name when its content changes, so the policy's name alone does not identify it.
    """
    allocator, found = policy.allocator if isinstance(policy, Compress) else None, []
    if isinstance(allocator, MeasuredNeed):
        found.append(array_digest(allocator.curves.rises))
        allocator = allocator.importance
    if isinstance(allocator, HeadImportance) and allocator.scores is not None:
        found.append(array_digest(allocator.scores.samples))
    return "+".join(found)
