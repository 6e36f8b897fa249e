"""Many policies on the same prompts: one prefill, shared by all of them.

Answers are teacher-forced through the compressed cache: every token of the right answer, and the
end after it, must be what the model finds most likely. That is when greedy decoding writes it.
Where the question is part of the prompt, the prefill predicts the answer's first token, before
anything is dropped, as it does in decoding.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache import AttentionSpec, PromptCache
from kvjax.config import ModelConfig
from kvjax.decoding import CHUNK, read_layer
from kvjax.example import Example
from kvjax.headkv.allocators import Uniform
from kvjax.headkv.plan import CompressedPlan, start_prompt
from kvjax.headkv.policy import Compress
from kvjax.headkv.prompt import Scorer
from kvjax.headkv.scorers import ObservationWindow
from kvjax.mesh import on_automatic_mesh
from kvjax.nn import Transformer
from kvjax.numerics import not_finite
from kvjax.ranges import COUNT, check_ranges
from kvjax.sampling import NO_TOKEN, most_likely
from kvjax.token_ids import token_ids

INSIDE, AFTER = "inside", "after"
PROTOCOLS = (INSIDE, AFTER)
"""Whether the question is part of the compressed prompt, or asked after its compression."""

FULL = "full"
SLOTS = 16


@dataclass(frozen=True)
class Compared:
    """How the policies did on the same examples.

    Attributes:
        right: [items] of each policy: the whole answer was right.
        cache_bytes: of each policy, for one sequence after prefill, without room for new tokens.
    """

    right: dict[str, Bool[np.ndarray, " items"]]
    cache_bytes: dict[str, int]


@dataclass(frozen=True)
class Batch:
    """Examples of one shape, right-padded.

    Attributes:
        context, lengths: [B, S] and [B], what is read and compressed.
        fed, positions: [B, T] what follows it, −1 for padding: the answer, after the question if
            that was not part of the context.
        wanted: [B, 1 + T] the token that should come after the context and after each fed one,
            −1 where nothing is asked.
    """

    context: Int[np.ndarray, "B S"]
    lengths: Int[np.ndarray, " B"]
    fed: Int[np.ndarray, "B T"]
    positions: Int[np.ndarray, "B T"]
    wanted: Int[np.ndarray, "B T1"]


def compare(
    model: Transformer,
    params: Any,
    examples: Sequence[Example],
    policies: Mapping[str, Compress],
    protocol: str = INSIDE,
    batch_size: int = 16,
    on_batch: Callable[[int], None] | None = None,
) -> Compared:
    """Answers every example under every policy and with the full cache (the policy "full").

    Args:
        policies: with their own scores, see `kvjax.headkv.policy.resolve`; all of one window.
        protocol: "inside" or "after".
        on_batch: called with the number of examples done.

    Raises:
        ValueError: an unknown protocol, policies of different windows, no examples, such that do
            not say how long their question is or that have tokens which the model does not have,
            a model without EOS, or one whose logits are not finite.
    """
    check_ranges({"batch_size": batch_size}, {"batch_size": COUNT})
    _check(model.config, examples, policies, protocol)
    params = on_automatic_mesh(params)
    everything = Compress(Uniform(), ObservationWindow(), kv_size=model.config.context_length)
    window = next((policy.window for policy in policies.values()), 8)
    policies = {FULL: dataclasses.replace(everything, window=window), **policies}
    scorers = tuple({p.scorer for p in policies.values() if hasattr(p.scorer, "observer")})
    shape = _shape(examples, protocol)
    plans = {
        name: policy.plan(model.config, shape[0], params["embedding"].dtype)
        for name, policy in policies.items()
    }
    right = {name: np.zeros(len(examples), bool) for name in plans}
    sizes: dict[str, int] = {}
    for start in range(0, len(examples), batch_size):
        part = range(start, min(start + batch_size, len(examples)))
        padded = [examples[i] for i in part] + [examples[start]] * (batch_size - len(part))
        batch = make_batch(padded, protocol, model.config.eos_ids[0], *shape)
        caches, first = read(model, params, batch.context, batch.lengths, scorers, window)
        for name, plan in plans.items():
            chosen = tuple(_seen_by(cache, scorers, plan.scorer) for cache in caches)
            found = answer(model, params, chosen, batch.fed, batch.positions, plan)
            found = np.concatenate([np.asarray(first)[:, None], np.asarray(found)], axis=1)
            lost = ((found == NO_TOKEN) & (batch.wanted >= 0)).any(axis=1)
            if lost.any():
                row = int(np.argmax(lost))
                ids = [*padded[row].prompt, *padded[row].answer]
                what = f"the logits of example {start + row} under policy {name!r}"
                raise not_finite(what, model, params, ids)
            hits = ((found == batch.wanted) | (batch.wanted < 0)).all(axis=1)
            right[name][start : part.stop] = hits[: len(part)]
            if name not in sizes:
                sizes[name] = compressed_bytes(chosen, plan) // batch_size
        if on_batch is not None:
            on_batch(part.stop)
    return Compared(right, sizes)


@functools.partial(jax.jit, static_argnames=("model", "scorers", "window"))
def read(
    model: Transformer,
    params: Any,
    context: Int[Array, "B S"],
    lengths: Int[Array, " B"],
    scorers: tuple[Scorer, ...],
    window: int,
) -> tuple[list[PromptCache], Int[Array, " B"]]:
    """The caches of all layers before any compression, and the most likely next token."""

    def call(method: str, *args: Any) -> Any:
        return model.apply({"params": params}, *args, method=method)

    B, S = context.shape
    x = call("embed", context)
    caches = []
    for index, layer in enumerate(model.config.layers):
        observer = Observers(tuple(scorer.observer(layer.attention) for scorer in scorers))
        cache = start_prompt(layer.attention, B, S, window, x.dtype, observer)
        layer_call = functools.partial(call, "layer", index)
        x, cache = read_layer(layer_call, x, lengths, cache, lengths, CHUNK)
        caches.append(cache)
    x = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    return caches, most_likely(call("unembed", x)[:, 0])


@functools.partial(jax.jit, static_argnames=("model", "plan"))
def answer(
    model: Transformer,
    params: Any,
    caches: tuple[PromptCache, ...],
    fed: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    plan: CompressedPlan,
) -> Int[Array, "B T"]:
    """The most likely token after each fed one, over the compressed caches."""
    small = finish(caches, plan, fed.shape[1])
    logits, _ = model.apply({"params": params}, fed, positions, small)
    return most_likely(logits)


def finish(caches: Sequence[PromptCache], plan: CompressedPlan, room: int) -> list[Any]:
    """Every layer's cache, compressed."""
    return [plan.finish(layer, cache, room) for layer, cache in enumerate(caches)]


def compressed_bytes(caches: Sequence[PromptCache], plan: CompressedPlan) -> int:
    """Bytes of the compressed caches without room for new tokens."""
    shapes = jax.eval_shape(functools.partial(finish, plan=plan, room=0), caches)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


@dataclass(frozen=True)
class Observers:
    """Several observers as one; see `kvjax.cache.prompt.Observer`."""

    each: tuple[Any, ...]

    def start(self, q_BTNH: jax.Array, keys_BKSX: jax.Array) -> tuple[Any, ...]:
        """See `kvjax.cache.prompt.Observer`."""
        return tuple(observer.start(q_BTNH, keys_BKSX) for observer in self.each)

    def watch(
        self,
        state: Any,
        q_BTNH: Float[Array, "B T N X"],
        positions_BT: Int[Array, "B T"],
        keys_BKSX: Float[Array, "B K S X"],
        lengths_B: Int[Array, " B"],
        spec: AttentionSpec,
    ) -> tuple[Any, ...]:
        """See `kvjax.cache.prompt.Observer`."""
        rest = (q_BTNH, positions_BT, keys_BKSX, lengths_B, spec)
        return tuple(o.watch(s, *rest) for o, s in zip(self.each, state, strict=True))


def make_batch(
    examples: Sequence[Example], protocol: str, eos_id: int, slots: int, fed_slots: int
) -> Batch:
    """Arrays of a few examples."""
    B = len(examples)
    context, lengths = np.zeros((B, slots), np.int32), np.zeros(B, np.int32)
    fed, positions = np.zeros((B, fed_slots), np.int32), np.full((B, fed_slots), -1, np.int32)
    wanted = np.full((B, fed_slots + 1), -1, np.int32)
    for row, example in enumerate(examples):
        asked = example.question_length if protocol == AFTER else 0
        n = len(example.prompt) - asked
        rest = [*example.prompt[n:], *example.answer]
        context[row, :n], lengths[row] = example.prompt[:n], n
        fed[row, : len(rest)] = rest
        positions[row, : len(rest)] = n + np.arange(len(rest))
        wanted[row, asked : len(rest) + 1] = [*example.answer, eos_id]
    return Batch(context, lengths, fed, positions, wanted)


def _shape(examples: Sequence[Example], protocol: str) -> tuple[int, int]:
    """Slots of the context and of what is fed, the same for all batches."""
    asked = [e.question_length if protocol == AFTER else 0 for e in examples]
    slots = max(len(e.prompt) - n for e, n in zip(examples, asked, strict=True))
    fed = max(len(e.answer) + n for e, n in zip(examples, asked, strict=True))
    return round_up(slots), round_up(fed)


def round_up(size: int) -> int:
    """To a multiple of SLOTS, so that sets of examples share their programs."""
    return -(-size // SLOTS) * SLOTS


def _seen_by(cache: PromptCache, scorers: tuple[Scorer, ...], scorer: Scorer) -> PromptCache:
    """The cache with the state of one scorer's observer only."""
    seen = cache.seen[scorers.index(scorer)] if scorer in scorers else None
    return dataclasses.replace(cache, seen=seen, observer=None)


def _check(
    config: ModelConfig,
    examples: Sequence[Example],
    policies: Mapping[str, Compress],
    protocol: str,
) -> None:
    if not examples:
        raise ValueError("got no examples, expected at least one")
    if not config.eos_ids:
        raise ValueError("the model has no EOS id, expected one: an answer ends with it")
    for index, example in enumerate(examples):
        token_ids([*example.prompt, *example.answer], config.vocab_size, f"example {index}")
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol is {protocol!r}, expected one of {', '.join(PROTOCOLS)}")
    windows = sorted({policy.window for policy in policies.values()})
    if len(windows) > 1:
        raise ValueError(f"policies have windows {windows}, expected one: they share a prefill")
    silent = [i for i, example in enumerate(examples) if not example.question_length]
    if protocol == AFTER and silent:
        raise ValueError(f"example {silent[0]} does not say how long its question is")
