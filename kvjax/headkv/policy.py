"""Cache policies: what the cache keeps of a prompt. A policy is an allocator and a scorer."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from kvjax.config import ModelConfig
from kvjax.headkv.allocators import Allocator, HeadImportance, Request, Uniform
from kvjax.headkv.plan import (
    CompressedPlan,
    FullPlan,
    Plan,
    kv_heads,
    no_head_budget,
    sliding_windows,
)
from kvjax.headkv.prompt import Scorer
from kvjax.headkv.scores import HeadScores, check_shape
from kvjax.headkv.share import PromptShare
from kvjax.headkv.size import bytes_to_tokens
from kvjax.headkv.split import Split
from kvjax.ranges import COUNT, SIZE, Range, check_ranges
from pallas_kernels.quantized import DTYPES

RANGES = {
    **dict.fromkeys(("kv_size", "ring", "every"), SIZE),
    "window": COUNT,
    "ratio": Range(above=0, most=1, optional=True),
    "nbytes": Range(least=1, whole=True, optional=True),
    "recent": Range(least=0, below=1),
}
"""The numbers of a `Compress` policy."""


class Policy(ABC):
    """What the cache keeps of a prompt, for any model and prompt length."""

    @abstractmethod
    def plan(self, config: ModelConfig, prompt_len: int, dtype: Any = "bfloat16") -> Plan:
        """Budgets for prompts of up to `prompt_len` tokens.

        Args:
            dtype: of the model's activations; budgets in bytes depend on it.

        Raises:
            NotImplementedError: the policy cannot serve a layer of this model; says why.
        """

    @staticmethod
    def parse(text: str) -> Policy:
        """A policy from its name and settings, "headkv:kv_size=128,beta=1.2,scores=heads.json".

        Raises:
            ValueError: an unknown name or setting, or a value that does not fit.
        """
        from kvjax.headkv.named import parse

        return parse(text)


@dataclass(frozen=True)
class Full(Policy):
    """Everything stays: the uncompressed cache.

    Attributes:
        entries: "int8" or "fp8" for entries in 8 bits; "" for the model's dtype.
    """

    entries: str = ""

    def __post_init__(self):
        entry_dtype(self.entries)

    def plan(self, config: ModelConfig, prompt_len: int, dtype: Any = "bfloat16") -> FullPlan:
        """See `Policy.plan`."""
        return FullPlan(config, entry_dtype(self.entries))


@dataclass(frozen=True)
class Compress(Policy):
    """Each KV head keeps its budget of tokens, the best by the scorer, and the last `window`.

    The size is given in one of three ways: `kv_size` tokens, a `ratio` of the prompt, or `nbytes`.

    Attributes:
        allocator: divides the KV size among the heads, on the host.
        scorer: rates the tokens of a prompt, inside jit; both must be hashable.
        kv_size: C, mean tokens a KV head, the window included; 0 where the size is given otherwise.
        window: w, last tokens that always stay; their queries are what scorers see.
        split: moves budgets between the heads of a layer by the scores of each prompt.
        ratio: KV size as a share of each prompt, 0 < ratio ≤ 1. The rows of the cache are those of
            the prompt's bucket, of which a shorter prompt leaves some empty.
        nbytes: bytes of all layers' entries of one sequence, after prefill.
        recent: share of the budget that goes to the most recent tokens; with a ratio, of the
            bucket's budget.
        entries: "int8" or "fp8" for entries in 8 bits; "" for the model's dtype.
        ring: bounds the growth: heads with a budget below the mean keep only so many new tokens,
            the most recent; 0 for no bound.
        every: compress again after so many new tokens; 0 for never.
    """

    allocator: Allocator
    scorer: Scorer
    kv_size: int = 128
    window: int = 8
    split: Split | None = None
    ratio: float | None = None
    nbytes: int | None = None
    recent: float = 0.0
    entries: str = ""
    ring: int = 0
    every: int = 0

    def __post_init__(self):
        check_ranges(vars(self), RANGES)
        given = [self.kv_size != 0, self.ratio is not None, self.nbytes is not None]
        if sum(given) != 1:
            raise ValueError(
                f"kv_size is {self.kv_size}, ratio {self.ratio} and bytes {self.nbytes}, expected "
                "one of them"
            )
        if self.ring and self.every:
            raise ValueError("ring and every both bound the growth, expected one of them")
        if self.ring and isinstance(self.allocator, Uniform):
            raise ValueError(
                f"ring is {self.ring}, which bounds heads whose budget is below the mean: uniform "
                "budgets have none; expected every=, or a policy with budgets for each head"
            )
        if self.kv_size:
            check_size(self.kv_size, self.window)
        entry_dtype(self.entries)

    def plan(self, config: ModelConfig, prompt_len: int, dtype: Any = "bfloat16") -> CompressedPlan:
        """See `Policy.plan`."""
        if self.every:
            check_again(config, self.scorer)
        entries = entry_dtype(self.entries)
        size = self.size(config, prompt_len, entries or dtype)
        check_size(size, self.window)
        window = self.window + int(self.recent * (size - self.window))
        sliding = sliding_windows(config)
        # A text that is compressed while it grows may come to fill what its prompt does not.
        reach = config.context_length if self.every else prompt_len
        request = Request(config.num_layers, kv_heads(config), size, window, reach, sliding)
        caps = np.asarray(self.allocator(request))
        check_caps(caps, request)
        caps = np.minimum(caps, request.limits)
        return CompressedPlan(
            config,
            tuple(tuple(int(cap) for cap in row) for row in caps),
            window,
            self.window,
            self.scorer,
            self.split,
            entries,
            self.ring or None,
            self.every or None,
            self._share(size, window),
        )

    def size(self, config: ModelConfig, prompt_len: int, dtype: Any) -> int:
        """C, mean tokens a KV head, for a prompt of `prompt_len` tokens."""
        if self.nbytes is not None:
            return bytes_to_tokens(self.nbytes, config, dtype)
        if self.ratio is not None:
            return max(round(self.ratio * prompt_len), self.window + 1)
        return self.kv_size

    def _share(self, size: int, window: int) -> PromptShare | None:
        if self.ratio is None:
            return None
        return PromptShare(self.ratio, window, self.window, size - window)


def check_again(config: ModelConfig, scorer: Scorer) -> None:
    """Raises NotImplementedError where a cache cannot be compressed while decoding."""
    if hasattr(scorer, "observer"):
        name = type(scorer).__name__
        raise NotImplementedError(f"every: {name} watches the prompt, which is gone by then")
    for index, layer in enumerate(config.layers):
        reason = no_head_budget(layer.attention)
        if reason is not None:
            raise NotImplementedError(f"layer {index} cannot be compressed again: {reason}")


def check_size(size: int, window: int) -> None:
    """Raises ValueError where nothing is left besides the window."""
    if size <= window:
        raise ValueError(f"kv_size is {size} and window is {window}, expected kv_size > window")


def entry_dtype(name: str) -> str | None:
    """The dtype that a policy's `entries` name; None for the model's own."""
    if name and name not in DTYPES:
        raise ValueError(f"entries is {name!r}, expected one of {', '.join(DTYPES)}")
    return jnp.dtype(DTYPES[name]).name if name else None


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
    if caps.sum() > request.budget * caps.size:
        raise ValueError(
            f"the allocator gave {caps.sum()} tokens in all, expected at most "
            f"{request.budget} · {caps.size} heads"
        )
