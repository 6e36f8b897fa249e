"""Cache policies: what the cache keeps of a prompt. A policy is an allocator and a scorer."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvjax.config import ModelConfig
from kvjax.headkv.allocators import Allocator, HeadImportance, Pyramid, Request, Uniform
from kvjax.headkv.budgets import token_budget
from kvjax.headkv.plan import CompressedPlan, FullPlan, Plan, kv_heads, no_head_budget
from kvjax.headkv.scorers import ObservationWindow, SinksAndRecent
from kvjax.headkv.scores import HeadScores, check_shape, load_scores
from kvjax.headkv.selection import Scorer


class Policy(ABC):
    """What the cache keeps of a prompt, for any model and prompt length."""

    @abstractmethod
    def plan(self, config: ModelConfig, prompt_len: int) -> Plan:
        """Budgets for prompts of up to `prompt_len` tokens.

        Raises:
            NotImplementedError: the policy cannot serve a layer of this model; says why.
        """

    @staticmethod
    def parse(text: str) -> Policy:
        """A policy from its name and settings, "headkv:kv_size=128,beta=1.2,scores=heads.json".

        Raises:
            ValueError: an unknown name or setting, or a value that does not fit.
        """
        return parse(text)


@dataclass(frozen=True)
class Full(Policy):
    """Everything stays: the uncompressed cache."""

    def plan(self, config: ModelConfig, prompt_len: int) -> FullPlan:
        """See `Policy.plan`."""
        return FullPlan(config)


@dataclass(frozen=True)
class Compress(Policy):
    """Each KV head keeps its budget of tokens, the best by the scorer, and the last `window`.

    Attributes:
        allocator: divides the KV size among the heads, on the host.
        scorer: rates the tokens of a prompt, inside jit; both must be hashable.
        kv_size: mean tokens a KV head, the window included.
        window: w, last tokens that always stay; their queries are what scorers see.
    """

    allocator: Allocator
    scorer: Scorer
    kv_size: int = 128
    window: int = 8

    def __post_init__(self):
        if self.window < 1:
            raise ValueError(f"window is {self.window}, expected at least 1")
        token_budget(self.kv_size, self.window)

    def plan(self, config: ModelConfig, prompt_len: int) -> CompressedPlan:
        """See `Policy.plan`."""
        for index, layer in enumerate(config.layers):
            reason = no_head_budget(layer.attention)
            if reason is not None:
                raise NotImplementedError(f"layer {index} cannot have head budgets: {reason}")
        heads = kv_heads(config)
        request = Request(config.num_layers, heads, self.kv_size, self.window, prompt_len)
        caps = np.asarray(self.allocator(request))
        check_caps(caps, request)
        as_tuples = tuple(tuple(int(cap) for cap in row) for row in caps)
        return CompressedPlan(config, as_tuples, self.window, self.scorer)


def resolve(policy: str | Policy, config: ModelConfig, scores: HeadScores | None) -> Policy:
    """A policy ready for this model: parsed, and with head scores where it needs them.

    Args:
        scores: the model's own, for a policy that names none.

    Raises:
        ValueError: an unknown policy, no scores, or scores of a model of another shape.
    """
    policy = Policy.parse(policy) if isinstance(policy, str) else policy
    if not isinstance(policy, Compress) or not isinstance(policy.allocator, HeadImportance):
        return policy
    chosen = policy.allocator.scores or scores
    if chosen is None:
        raise ValueError(
            "the headkv policy needs head scores and this model has none: make them with "
            "`kvjax score MODEL heads.json`, then pass scores=heads.json"
        )
    check_shape(chosen, config)
    allocator = dataclasses.replace(policy.allocator, scores=chosen)
    return dataclasses.replace(policy, allocator=allocator)


def check_caps(caps: np.ndarray, request: Request) -> None:
    """Raises ValueError where an allocator's budgets are not what was asked for."""
    shape = (request.num_layers, request.num_kv_heads)
    if caps.shape != shape or not np.issubdtype(caps.dtype, np.integer):
        raise ValueError(
            f"the allocator gave {caps.dtype} {caps.shape}, expected whole numbers {shape}"
        )
    if caps.min() < 0 or caps.max() > request.limit:
        raise ValueError(
            f"the allocator gave budgets of {caps.min()} to {caps.max()}, "
            f"expected 0 to {request.limit} for {request.prompt_len} tokens"
        )


# --- By name ---


def full() -> Policy:
    """The uncompressed cache."""
    return Full()


def streaming(kv_size: int = 128, window: int = 8, sinks: int = 4) -> Policy:
    """StreamingLLM: the first and the last tokens, in every head."""
    return Compress(Uniform(), SinksAndRecent(sinks), kv_size, window)


def snapkv(kv_size: int = 128, window: int = 8, pool: int = 7) -> Policy:
    """SnapKV: what the last queries look at, as many tokens in every head."""
    return Compress(Uniform(), ObservationWindow(pool), kv_size, window)


def pyramidkv(kv_size: int = 128, window: int = 8, pool: int = 7, beta: float = 20.0) -> Policy:
    """PyramidKV: as SnapKV, with more tokens in the lower layers."""
    return Compress(Pyramid(beta), ObservationWindow(pool), kv_size, window)


def headkv(
    kv_size: int = 128, window: int = 8, pool: int = 7, beta: float = 1.2, scores: str = ""
) -> Policy:
    """HeadKV: as SnapKV, with more tokens in the heads that retrieve and reason.

    `scores` is a score file; empty for the model's own.
    """
    importance = HeadImportance(beta, load_scores(scores) if scores else None)
    return Compress(importance, ObservationWindow(pool), kv_size, window)


POLICIES: dict[str, Callable[..., Policy]] = {
    maker.__name__: maker for maker in (full, streaming, snapkv, pyramidkv, headkv)
}


def parse(text: str) -> Policy:
    """See `Policy.parse`."""
    name, _, settings = text.partition(":")
    if name not in POLICIES:
        raise ValueError(f"policy {name!r} is none of {', '.join(POLICIES)}")
    types = typing.get_type_hints(POLICIES[name])
    known = list(inspect.signature(POLICIES[name]).parameters)
    arguments = {}
    for setting in filter(None, settings.split(",")):
        key, equals, value = setting.partition("=")
        if key not in known or not equals:
            expected = ", ".join(f"{k}=…" for k in known) or "no settings"
            raise ValueError(f"policy {name!r}: {setting!r} is not understood, expected {expected}")
        arguments[key] = _value(name, key, value, types[key])
    return POLICIES[name](**arguments)


def _value(name: str, key: str, text: str, kind: type) -> int | float | str:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"policy {name!r}: {key} is {text!r}, expected {kind.__name__}") from None
