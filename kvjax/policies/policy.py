"""Cache policies: which tokens of a prompt the cache keeps. Most combine an allocator and a
scorer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from kvjax.cache.storage import room_bucket
from kvjax.checks import COUNT, SIZE, Range, check_ranges
from kvjax.config import ModelConfig
from kvjax.mesh import Placement
from kvjax.policies.budgets import (
    Allocator,
    Request,
    Sharing,
    Uniform,
    bytes_to_tokens,
    token_budget,
)
from kvjax.policies.compression import (
    Budgets,
    Compression,
    budgeted_layers,
    compression,
    kept_tokens,
)
from kvjax.policies.scorers import Scorer, queries_seen
from pallas_kernels.entries import DTYPES

RANGES = {
    **dict.fromkeys(("kv_size", "ring", "compression_interval"), SIZE),
    "observed": COUNT,
    "ratio": Range(above=0, most=1, optional=True),
    "nbytes": Range(least=1, whole=True, optional=True),
    "recent_share": Range(least=0, below=1),
}
"""Allowed values of the numbers of a `Compress` policy."""


Lengths = Sequence[int] | Int[np.ndarray, " B"]
"""Lengths of the prompts of a batch."""


class Policy(ABC):
    """Decides which tokens of a prompt the cache keeps, for any model and prompt length."""

    compression_interval: int = 0
    """The cache is compressed again after this many new tokens; 0 for never."""

    @property
    def bounds_growth(self) -> bool:
        """Whether entries leave the cache while new tokens come in.

        Text that is fed in pieces does not show the effect of such a policy.
        """
        return self.compression_interval > 0

    @abstractmethod
    def budgets(
        self, config: ModelConfig, lengths: Lengths, new_tokens: int, dtype: Any
    ) -> tuple[Budgets, list[int]]:
        """The tokens to keep of one batch of prompts.

        Args:
            lengths: [B] lengths of the prompts; a prompt's budgets do not depend on the others.
            new_tokens: number of new tokens that the caches must have room for.
            dtype: dtype of the model's activations; budgets in bytes depend on it.

        Returns:
            The budgets, and the numbers of the layers whose heads keep different tokens.

        Raises:
            NotImplementedError: a layer of this model does not support the policy; says why.
        """

    def compression(
        self,
        config: ModelConfig,
        lengths: Lengths,
        new_tokens: int,
        dtype: Any = "bfloat16",
        placement: Placement | None = None,
    ) -> Compression:
        """Applies the policy to one batch of prompts.

        Args:
            lengths, new_tokens, dtype: see `budgets`.
            placement: placement of the batch on a mesh; None for one device.

        Raises:
            NotImplementedError: see `budgets`.
        """
        budgets, layers = self.budgets(config, lengths, new_tokens, dtype)
        return compression(config, budgets, lengths, new_tokens, dtype, placement, layers)

    def kept(
        self, config: ModelConfig, prompt_len: int, dtype: Any = "bfloat16"
    ) -> Int[np.ndarray, "L K"]:
        """Tokens that each head keeps of a prompt, the recent ones included; the numbers before
        sharing if heads share a layer's budget."""
        work = self.compression(config, [prompt_len], 0, dtype)
        return kept_tokens(config, work.budgets, work.lengths)[0]


@dataclass(frozen=True)
class Full(Policy):
    """Keeps everything: the uncompressed cache.

    Attributes:
        entries: "int8", "fp8" or "int4" for smaller entries; "" for the model's dtype.
    """

    entries: str = ""

    def __post_init__(self):
        entry_dtype(self.entries)

    def budgets(
        self, config: ModelConfig, lengths: Lengths, new_tokens: int, dtype: Any
    ) -> tuple[Budgets, list[int]]:
        """See `Policy.budgets`. In layers whose sliding window is shorter than the cache, heads
        keep the last tokens in rings."""
        room = room_bucket(new_tokens)
        slots = max(lengths) + room
        windows = config.sliding_windows
        # Layers whose window is shorter than the cache: a ring in a pool holds all visible tokens.
        small = [i for i in budgeted_layers(config) if (windows[i] or slots) < slots]
        heads = config.layers[small[0]].attention.budget_heads if small else 1
        shape = (config.num_layers, heads)
        budgets = Budgets(
            caps=np.zeros((len(lengths), *shape), np.int32),
            recent=np.full(
                len(lengths), max([windows[i] or 0 for i in small], default=0), np.int32
            ),
            rooms=np.full((len(lengths), *shape), room, np.int32),
            rings=np.ones((len(lengths), *shape), bool),
            scorer=None,
            dtype=entry_dtype(self.entries),
        )
        return budgets, small

    def kept(
        self, config: ModelConfig, prompt_len: int, dtype: Any = "bfloat16"
    ) -> Int[np.ndarray, "L K"]:
        """See `Policy.kept`."""
        seen = [min(prompt_len, window or prompt_len) for window in config.sliding_windows]
        return np.repeat(np.asarray(seen, np.int32)[:, None], config.budget_heads, axis=1)


@dataclass(frozen=True)
class Compress(Policy):
    """Each KV head keeps the last `observed` tokens, and the best others within its budget.

    The size is given in one of three ways: `kv_size` tokens, a `ratio` of the prompt, or `nbytes`.

    Attributes:
        allocator: divides the KV size among the heads, on the host. Must be hashable.
        scorer: rates the tokens of a prompt, inside jit. Must be hashable.
        kv_size: C, mean tokens per KV head, the last ones included; 0 with `ratio` or `nbytes`.
        observed: w, number of last tokens that are always kept; scorers see their queries, if they
            ask for no other number.
        sharing: moves budgets between the heads of a layer by the token scores of each prompt.
        ratio: KV size as a share of each prompt, 0 < ratio ≤ 1.
        nbytes: bytes of one sequence's entries in all layers, after prefill.
        recent_share: share of the budget that goes to the most recent tokens.
        entries: "int8", "fp8" or "int4" for smaller entries; "" for the model's dtype.
        ring: bounds the growth: heads with a budget below the mean keep only this many of the new
            tokens, the most recent; 0 for no bound.
        compression_interval: compress again after this many new tokens; 0 for never.
    """

    allocator: Allocator
    scorer: Scorer
    kv_size: int = 128
    observed: int = 8
    sharing: Sharing | None = None
    ratio: float | None = None
    nbytes: int | None = None
    recent_share: float = 0.0
    entries: str = ""
    ring: int = 0
    compression_interval: int = 0

    def __post_init__(self):
        for name in ("allocator", "scorer"):
            if not callable(getattr(self, name)):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, expected a function; "
                    "kvjax.policies.parse_policy reads names"
                )
        check_ranges(vars(self), RANGES)
        given = [self.kv_size != 0, self.ratio is not None, self.nbytes is not None]
        if sum(given) != 1:
            raise ValueError(
                f"kv_size is {self.kv_size}, ratio is {self.ratio} and bytes is {self.nbytes}, "
                "expected one of the three"
            )
        if self.ring and self.compression_interval:
            raise ValueError(
                "ring and compression_interval both bound the growth, expected one of them"
            )
        if self.ring and isinstance(self.allocator, Uniform):
            raise ValueError(
                f"ring is {self.ring}, which bounds heads with a budget below the mean, and all "
                "heads of this policy have the same: expected compression_interval=, or headkv"
            )
        if self.kv_size:
            token_budget(self.kv_size, self.observed)
        entry_dtype(self.entries)

    @property
    def bounds_growth(self) -> bool:
        """See `Policy.bounds_growth`."""
        return self.compression_interval > 0 or self.ring > 0

    def budgets(
        self, config: ModelConfig, lengths: Lengths, new_tokens: int, dtype: Any
    ) -> tuple[Budgets, list[int]]:
        """See `Policy.budgets`."""
        if self.compression_interval:
            check_again(config, self.scorer)
        entries = entry_dtype(self.entries)
        # Budgets depend on a prompt's length alone: make them once for each length.
        each = {n: self.caps(config, n, entries or dtype) for n in {int(n) for n in lengths}}
        caps = np.stack([each[int(n)][0] for n in lengths])
        room = room_bucket(
            min(new_tokens, self.compression_interval) if self.compression_interval else new_tokens
        )
        # With `ring`, heads with a budget below the mean overwrite their older new tokens.
        small = (caps < caps.mean(axis=(1, 2), keepdims=True)) & (self.ring > 0)
        budgets = Budgets(
            caps=caps,
            recent=np.asarray([each[int(n)][1] for n in lengths], np.int32),
            rooms=np.where(small, min(room, self.ring or room), room).astype(np.int32),
            rings=small,
            scorer=self.scorer,
            sharing=self.sharing,
            observed=queries_seen(self.scorer, self.observed),
            again=bool(self.compression_interval),
            dtype=entries,
        )
        return budgets, budgeted_layers(config)

    def caps(
        self, config: ModelConfig, prompt_len: int, dtype: Any
    ) -> tuple[Int[np.ndarray, "L K"], int]:
        """[L, K] tokens that each head keeps besides the recent ones, and the number of those."""
        size = self.size(config, prompt_len, dtype)
        budget = token_budget(size, self.observed)
        recent = self.observed + int(self.recent_share * budget)
        # A text that is compressed while it grows may later fill budgets that its prompt does not.
        reach = config.context_length if self.compression_interval else prompt_len
        shape = config.num_layers, config.budget_heads
        request = Request(*shape, size, recent, reach, config.sliding_windows)
        caps = np.asarray(self.allocator(request))
        check_caps(caps, request)
        return np.minimum(caps, request.limits).astype(np.int32), recent

    def size(self, config: ModelConfig, prompt_len: int, dtype: Any) -> int:
        """C, mean tokens per KV head, for a prompt of `prompt_len` tokens."""
        if self.nbytes is not None:
            return bytes_to_tokens(self.nbytes, config, dtype)
        if self.ratio is not None:
            return max(round(self.ratio * prompt_len), self.observed + 1)
        return self.kv_size


def check_growth(policies: Iterable[Policy], purpose: str) -> None:
    """Raises ValueError if a policy bounds the growth of the cache, which `purpose` does not allow.

    Args:
        purpose: what the policies are for, such as "a context"; starts the error.
    """
    if any(policy.bounds_growth for policy in policies):
        raise ValueError(
            f"{purpose} needs a policy that keeps all new tokens, expected one without ring and "
            "compression_interval"
        )


def check_again(config: ModelConfig, scorer: Scorer) -> None:
    """Raises NotImplementedError if a cache cannot be compressed while decoding."""
    if hasattr(scorer, "observer"):
        name = type(scorer).__name__
        raise NotImplementedError(
            f"compression_interval needs another scorer: {name} watches the prompt only"
        )
    for index, layer in enumerate(config.layers):
        reason = layer.attention.no_head_budget
        if reason is not None:
            raise NotImplementedError(f"layer {index} cannot be compressed again: {reason}")


def entry_dtype(name: str) -> str | None:
    """The dtype for a policy's `entries`; None for the model's own."""
    if name and name not in DTYPES:
        raise ValueError(f"entries is {name!r}, expected one of {', '.join(DTYPES)}")
    return jnp.dtype(DTYPES[name]).name if name else None


def check_caps(caps: np.ndarray, request: Request) -> None:
    """Raises ValueError if an allocator's budgets violate the contract of `Allocator`."""
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
