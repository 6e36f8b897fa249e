"""Policies by name: the table of methods, and the strings that choose from it."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable

from kvjax.headkv.allocators import HeadImportance, Pyramid, Uniform
from kvjax.headkv.observers import ColumnSums, ExpectedAttention
from kvjax.headkv.policy import Compress, Full, Policy
from kvjax.headkv.scorers import (
    KeyDifference,
    KeyNorm,
    LastQuery,
    ObservationWindow,
    SinksAndRecent,
    SpanWindow,
)
from kvjax.headkv.scores import HeadScores, load_scores
from kvjax.headkv.split import Adaptive


def streaming(sinks: int = 4) -> Compress:
    """StreamingLLM (arXiv 2309.17453): the first and the last tokens, in every head."""
    return Compress(Uniform(), SinksAndRecent(sinks))


def snapkv(pool: int = 7) -> Compress:
    """SnapKV (arXiv 2404.14469): what the last queries look at, as many tokens in every head."""
    return Compress(Uniform(), ObservationWindow(pool))


def spankv(ahead: int = 11, behind: int = 3, falloff: float = 0.01) -> Compress:
    """As SnapKV, with the tokens after what the last queries look at (see `SpanWindow`)."""
    return Compress(Uniform(), SpanWindow(ahead, behind, falloff))


def pyramidkv(pool: int = 7, beta: float = 20.0) -> Compress:
    """PyramidKV (arXiv 2406.02069): as SnapKV, with more tokens in the lower layers."""
    return Compress(Pyramid(beta), ObservationWindow(pool))


def adasnapkv(pool: int = 7, alpha: float = 0.2) -> Compress:
    """Ada-SnapKV (arXiv 2407.11550): the heads of a layer share its budget by their scores."""
    return Compress(Uniform(), ObservationWindow(pool), split=Adaptive(alpha))


def h2o(recent: float = 0.5) -> Compress:
    """H2O (arXiv 2306.14048): tokens that all queries look at, and as many recent ones."""
    return Compress(Uniform(), ColumnSums(), recent=recent)


def tova() -> Compress:
    """TOVA (arXiv 2401.06104): what the last query looks at, the same in all heads of a layer."""
    return Compress(Uniform(), LastQuery())


def knorm() -> Compress:
    """KNorm (arXiv 2406.11430): keys of small norm."""
    return Compress(Uniform(), KeyNorm())


def keydiff() -> Compress:
    """KeyDiff (arXiv 2504.15364): keys unlike the others."""
    return Compress(Uniform(), KeyDifference())


def expected(future: int = 512) -> Compress:
    """Expected Attention (arXiv 2510.00636): what the queries to come will look at."""
    return Compress(Uniform(), ExpectedAttention(future))


def headkv(
    ahead: int = 11,
    behind: int = 3,
    falloff: float = 0.01,
    beta: float = 0.0,
    scores: str = "",
) -> Compress:
    """HeadKV (arXiv 2410.19258), with what measured better than the paper's rules.

    Budgets by head importance with a floor that grows (`growing_beta`), tokens by `SpanWindow`.

    Args:
        ahead, behind, falloff: see `SpanWindow`.
        beta: 0 for `growing_beta`.
        scores: a score file of any estimator; empty for the model's own.
    """
    importance = HeadImportance(beta or None, _file(scores))
    return Compress(importance, SpanWindow(ahead, behind, falloff))


def headkv_paper(pool: int = 7, beta: float = 1.2, scores: str = "") -> Compress:
    """HeadKV by the paper's rules: a fixed β, and SnapKV's choice of tokens.

    It is HeadKV-R with scores of the estimator "retrieval", HeadKV-R2 with "retrieval_reasoning".
    Budgets and choice are per KV head; the published code has both for every query head.
    """
    return Compress(HeadImportance(beta, _file(scores)), ObservationWindow(pool))


def headkv_adaptive(
    ahead: int = 11,
    behind: int = 3,
    falloff: float = 0.01,
    beta: float = 0.0,
    alpha: float = 0.2,
    scores: str = "",
) -> Compress:
    """As `headkv`, but the heads of a layer share its budget by their scores as in Ada-KV."""
    importance = HeadImportance(beta or None, _file(scores))
    return Compress(importance, SpanWindow(ahead, behind, falloff), split=Adaptive(alpha))


MAKERS: dict[str, Callable[..., Compress]] = {
    maker.__name__: maker
    for maker in (
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

COMMON = {
    "kv_size": int,
    "ratio": float,
    "bytes": int,
    "window": int,
    "entries": str,
    "ring": int,
    "every": int,
}
"""Settings of every policy that compresses; see `Compress`."""


def parse(text: str) -> Policy:
    """See `Policy.parse`."""
    name, _, settings = text.partition(":")
    if name != "full" and name not in MAKERS:
        raise ValueError(f"policy {name!r} is none of full, {', '.join(MAKERS)}")
    if name == "full":
        return Full(**_read(name, settings, {"entries": str}))
    own = typing.get_type_hints(MAKERS[name])
    own = {key: own[key] for key in inspect.signature(MAKERS[name]).parameters}
    values = _read(name, settings, COMMON | own)
    policy = MAKERS[name](**{key: value for key, value in values.items() if key in own})
    common = {key: value for key, value in values.items() if key not in own}
    if "bytes" in common:
        common["nbytes"] = common.pop("bytes")
    if "ratio" in common or "nbytes" in common:
        common.setdefault("kv_size", 0)
    return dataclasses.replace(policy, **common)


def _read(name: str, settings: str, kinds: dict[str, type]) -> dict[str, typing.Any]:
    values = {}
    for setting in filter(None, settings.split(",")):
        key, equals, value = setting.partition("=")
        if key not in kinds or not equals:
            expected = ", ".join(f"{k}=…" for k in kinds)
            raise ValueError(f"policy {name!r}: {setting!r} is not understood, expected {expected}")
        if key in values:
            raise ValueError(f"policy {name!r}: {key} is given twice, expected once")
        try:
            values[key] = kinds[key](value)
        except ValueError:
            kind = kinds[key].__name__
            raise ValueError(f"policy {name!r}: {key} is {value!r}, expected {kind}") from None
    return values


def _file(scores: str) -> HeadScores | None:
    return load_scores(scores) if scores else None
