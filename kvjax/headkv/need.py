"""Measures how much each head needs: the loss of the answer against the tokens that it keeps.

The prompt is read once. For each layer, head and size, the answer is judged again from the same
keys and values, with all tokens hidden from this head but those that a scorer keeps. All heads and
sizes of a layer are judged together, as rows of one batch.

Other heads often do the same work, so one head that forgets everything may change nothing while
they remember everything. So the other heads keep a base size meanwhile, and the curves are measured
for several bases.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float64, Int

from kvjax.cache import AttentionSpec, LatentCache, PrefillCache
from kvjax.cache.attention import Expand
from kvjax.example import Example
from kvjax.feeding import judge, not_finite
from kvjax.headkv.examples import bucketed
from kvjax.headkv.measure import check_examples
from kvjax.mesh import automatic_axes, on_automatic_mesh
from kvjax.nn import Transformer
from kvjax.nn.checks import check_fits
from kvjax.nn.transformer import BlockKind, block_kinds, embed, run_layer
from kvjax.policies.need import NeedCurves
from kvjax.policies.scorers import (
    LayerView,
    Scorer,
    SpanWindow,
    attention_weights,
    queries_seen,
)
from kvjax.policies.selection import Ranking, rank_common, rank_heads
from kvjax.prefilling import bucket_length, pad, read_layer

SIZES = (0, 4, 16, 64)
"""Tokens that a head keeps besides the recent ones; the whole prompt follows."""
BASES = (8,)
"""Tokens that the other heads keep meanwhile."""
WHOLE = 2**30
"""A size beyond every prompt."""


@dataclass(frozen=True, eq=False)
class BatchNeed:
    """Measurements on one batch of examples.

    Attributes:
        indices: the examples, as indices into the caller's list.
        losses: [n, bases] negative log-likelihood of each answer when all heads keep a base, nats.
        rises: [n, L, K, P] its rise for each head and size, over the loss when this head keeps the
            whole prompt; the mean over the bases.
    """

    indices: tuple[int, ...]
    losses: Float64[np.ndarray, "n bases"]
    rises: Float64[np.ndarray, "n L K P"]


@automatic_axes()
def measure_need(
    model: Transformer,
    params: Any,
    examples: Sequence[Example],
    scorer: Scorer | None = None,
    sizes: Sequence[int] = SIZES,
    bases: Sequence[int] = BASES,
    observed: int = 8,
    batch_size: int = 4,
    finished: Iterable[BatchNeed] = (),
    on_batch: Callable[[BatchNeed], None] | None = None,
) -> NeedCurves:
    """Curves of need of every KV head, from prompts with their answers.

    Examples:
        >>> curves = kvjax.headkv.measure_need(model, params, examples, sizes=(0, 8), batch_size=2)
        >>> curves.rises.shape  # layers, KV heads, and the two sizes and the whole prompt
        (2, 2, 3)

    Args:
        examples: any mixture of questions; a head that some of them need gets tokens.
        scorer: chooses the tokens that a head keeps; None for `SpanWindow`.
        sizes: tokens that a head keeps besides the recent ones, rising from 0.
        bases: tokens that the other heads keep meanwhile, besides the recent ones.
        observed: number of recent tokens, which every head keeps; see `queries_seen`.
        batch_size: examples at a time.
        finished: batches of an earlier, interrupted call with the same arguments.
        on_batch: called with each new batch.

    Raises:
        ValueError: no example, an example that the model cannot read, or losses that are not
            finite.
    """
    check_fits(model, params)
    check_examples(examples, False, model.config)
    params, scorer = on_automatic_mesh(params), scorer or SpanWindow()
    done = {batch.indices: batch for batch in finished}
    for indices in map(tuple, bucketed(examples, batch_size)):
        if indices not in done:
            chunk = [examples[i] for i in indices]
            rows = [*chunk, *chunk[-1:] * (batch_size - len(chunk))]
            losses, rises = batch_need(
                model, params, rows, scorer, (*sizes, WHOLE), tuple(bases), observed
            )
            n = len(chunk)
            if not np.isfinite(losses[:n]).all() or not np.isfinite(rises[:n]).all():
                what = f"the losses of examples {indices}"
                raise not_finite(what, model, params, chunk[0].prompt)
            done[indices] = BatchNeed(indices, losses[:n], rises[:n])
            if on_batch is not None:
                on_batch(done[indices])
    rises = np.concatenate([batch.rises for batch in done.values()])
    losses = np.concatenate([batch.losses for batch in done.values()])
    whole = max(max(len(example.prompt) for example in examples) - observed, sizes[-1] + 1)
    kinds = sorted({example.name for example in examples})
    meta = {
        "scorer": repr(scorer),
        "observed": observed,
        "bases": list(bases),
        "examples": len(examples),
        "kinds": kinds,
        "mean_losses": losses.mean(axis=0).tolist(),
    }
    error = rises.std(axis=0, ddof=1) / np.sqrt(len(rises)) if len(rises) > 1 else 0 * rises[0]
    return NeedCurves(np.asarray([*sizes, whole]), rises.mean(axis=0), error, meta)


def batch_need(
    model: Transformer,
    params: Any,
    examples: Sequence[Example],
    scorer: Scorer,
    sizes: tuple[int, ...],
    bases: tuple[int, ...],
    observed: int,
) -> tuple[Float64[np.ndarray, "B bases"], Float64[np.ndarray, "B L K P"]]:
    """`BatchNeed.losses` and `BatchNeed.rises` of a batch; the last size is the whole prompt."""
    reading = read(model, params, examples, scorer, (*sizes, *bases), observed)
    heads, P = model.config.budget_heads, len(sizes)
    losses, rises = [], np.zeros((len(examples), model.config.num_layers, heads, P))
    for place in range(P, P + len(bases)):
        base = [
            reading.masked(index, kept[place : place + 1])
            for index, kept in enumerate(reading.kept)
        ]
        inputs = reading.layers(params, embed(model.config, params, reading.steps), 0, base)
        losses.append(reading.losses(model, params, inputs[-1])[0])
        # Layers below the one whose heads change compute what they compute at the base.
        for index, kept in enumerate(reading.kept):
            own = reading.masked(index, one_head_at_a_time(kept[:P], kept[place]))
            x = jnp.tile(inputs[index], (own.kept.shape[0], 1, 1))
            x = reading.layers(params, x, index, [*base[:index], own, *base[index + 1 :]])[-1]
            found = reading.losses(model, params, x).reshape(-1, P, len(examples))
            rise = np.moveaxis(found - found[:, -1:], 2, 0) / len(bases)
            # Heads that share their tokens share one curve: each gets its part.
            rises[:, index] += rise if rise.shape[1] == heads else rise / heads
    return np.stack(losses, axis=1), rises


class Reading(NamedTuple):
    """A batch of prompts that was read, and the answers that are judged from it.

    Attributes:
        kinds: the blocks of the model.
        prompts: each layer's keys and values.
        kept: for each layer [P, B, Z, S] the tokens that a head keeps at each size.
        steps, positions, wanted: [B, M], see `answer_steps`.
        lengths, rope_lengths: [B] lengths of the prompts, and with the answers.
    """

    kinds: Sequence[BlockKind]
    prompts: list[PrefillCache]
    kept: list[jax.Array]
    steps: Int[np.ndarray, "B M"]
    positions: Int[np.ndarray, "B M"]
    wanted: Int[np.ndarray, "B M"]
    lengths: Int[Array, " B"]
    rope_lengths: Int[Array, " B"]

    def masked(self, index: int, kept: Bool[Array, "V B Z S"]) -> HeadMask:
        """One layer's prompt with the kept tokens of V copies of the batch."""
        spec = self.kinds[index].block.layer.attention.spec
        return HeadMask.create(self.prompts[index], spec, self.lengths, kept)

    def layers(
        self, params: Any, x: Float[Array, "R M D"], first: int, caches: Sequence[HeadMask]
    ) -> list[jax.Array]:
        """The inputs of the layers from `first` on, and the last output; R rows are copies."""
        found, copies = [x], x.shape[0] // len(self.steps)
        positions = jnp.asarray(np.tile(self.positions, (copies, 1)))
        lengths = jnp.tile(self.rope_lengths, copies)
        for index in range(first, len(self.kinds)):
            own = params[f"layers_{index}"]
            x, _ = run_layer(self.kinds[index], own, x, positions, caches[index], lengths)
            found.append(x)
        return found

    def losses(
        self, model: Transformer, params: Any, x: Float[Array, "R M D"]
    ) -> Float64[np.ndarray, "V B"]:
        """Negative log-likelihood of each answer, from the last output of V copies."""
        wanted = np.tile(self.wanted, (x.shape[0] // len(self.wanted), 1))
        found, _ = judge(model, params, x, wanted)
        return np.asarray(found, np.float64).sum(axis=1).reshape(-1, len(self.wanted))


def read(
    model: Transformer,
    params: Any,
    examples: Sequence[Example],
    scorer: Scorer,
    sizes: tuple[int, ...],
    observed: int,
) -> Reading:
    """Reads prompts, and ranks their tokens for each head."""
    prompts = [example.prompt for example in examples]
    tokens, lengths = pad(prompts, bucket_length(max(map(len, prompts))))
    longest = max(len(example.answer) for example in examples)
    lengths, total = jnp.asarray(lengths), jnp.asarray(lengths + np.int32(longest))
    recent, counts = np.full(len(examples), observed, np.int32), np.asarray(sizes, np.int32)
    watching = getattr(scorer, "observer", None)
    x, caches, masks = embed(model.config, params, tokens), [], []
    for index, kind in enumerate(block_kinds(model.config)):
        attention = kind.block.layer.attention
        settings: dict[str, Any] = {"observed": queries_seen(scorer, observed)}
        seen = settings | {"observers": () if watching is None else (watching(attention),)}
        own = params[f"layers_{index}"]
        x, prefilled = read_layer(kind.block, own, kind.pairs, x, lengths, total, **seen)
        prefilled = prefilled.seen_by(None if watching is None else 0)
        settings |= {"scorer": scorer, "spec": attention.spec}
        if attention.no_head_budget is None:
            ranking = rank_heads(prefilled, recent, **settings, placement=None)
        else:
            ranking = rank_common(prefilled, recent, **settings)
        masks.append(kept_tokens(prefilled, ranking, recent, counts, attention.spec))
        caches.append(prefilled.seen_by(None))
    answers = answer_steps(examples)
    return Reading(block_kinds(model.config), caches, masks, *answers, lengths, total)


@functools.partial(jax.jit, static_argnames="spec")
def kept_tokens(
    prompt: PrefillCache,
    ranking: Ranking,
    recent: Int[Array, " B"],
    counts: Int[Array | np.ndarray, " P"],
    spec: AttentionSpec,
) -> Bool[Array, "P B Z S"]:
    """The tokens that each head keeps at each of P counts, the recent ones included."""
    view = LayerView.create(prompt, spec, recent)
    B, Z, S = ranking.scores.shape
    available = jnp.sum(view.candidates, axis=2, dtype=jnp.int32)
    slots = jnp.arange(S, dtype=jnp.int32)
    is_recent = slots[None] >= (view.lengths - recent)[:, None]

    def at(count: jax.Array) -> jax.Array:
        counts = jnp.broadcast_to(jnp.minimum(count, available), (B, Z))
        chosen = ranking.select(view.candidates, counts)
        rows, heads = (jnp.arange(n, dtype=jnp.int32) for n in (B, Z))
        kept = jnp.zeros((B, Z, S), bool)
        # In the places beyond a head's number `select` has S, which no slot has: it is dropped.
        kept = kept.at[rows[:, None, None], heads[None, :, None], chosen].set(True, mode="drop")
        return kept | is_recent[:, None]

    return jax.lax.map(at, jnp.asarray(counts))


def one_head_at_a_time(
    kept: Bool[Array, "P B Z S"], base: Bool[Array, "B Z S"]
) -> Bool[Array, "V B Z S"]:
    """For each head and size, V = Z·P: this head's tokens at this size, the others' at the base."""
    P, B, Z, S = kept.shape
    here = jnp.eye(Z, dtype=bool)[:, None, None, :, None]
    return jnp.where(here, kept[None], base[None, None]).reshape(Z * P, B, Z, S)


def answer_steps(
    examples: Sequence[Example],
) -> tuple[Int[np.ndarray, "B M"], Int[np.ndarray, "B M"], Int[np.ndarray, "B M"]]:
    """The fed tokens, their positions, and the token that follows each; −1 for padding.

    A prompt's last token is fed again, so that the first token of the answer is judged like the
    others.
    """
    longest = max(len(example.answer) for example in examples)
    shape = len(examples), longest
    tokens, positions, wanted = np.zeros(shape, np.int32), np.full(shape, -1), np.full(shape, -1)
    for row, example in enumerate(examples):
        n, m = len(example.prompt), len(example.answer)
        tokens[row, :m] = [example.prompt[-1], *example.answer[:-1]]
        positions[row, :m] = np.arange(n - 1, n - 1 + m)
        wanted[row, :m] = example.answer
    return tokens, positions.astype(np.int32), wanted.astype(np.int32)


@flax.struct.dataclass
class HeadMask:
    """A prompt from which tokens are hidden, for each head and each copy of the batch apart.

    A cache of V copies of a batch that share one prompt. It stores nothing: the new tokens of a
    call attend to the prompt and to each other.

    Attributes:
        keys, values: [B, K, S, ·] the prompt, see `LayerView`.
        kept: [V, B, Z, S] bool, tokens that a head sees; V and Z may be 1.
        base: the prompt's uncompressed cache.
    """

    keys: Any
    values: Any
    kept: Any
    base: Any

    @classmethod
    def create(
        cls,
        prompt: PrefillCache,
        spec: AttentionSpec,
        lengths: Int[Array, " B"],
        kept: Bool[Array, "V B Z S"],
    ) -> HeadMask:
        """The kept tokens of a prompt but its last one, which is fed again."""
        view = LayerView.create(prompt, spec)
        slots = jnp.arange(view.keys.shape[2], dtype=jnp.int32)
        before = slots[None, None] < (lengths - 1)[:, None, None]
        return cls(view.keys, view.values, kept & before[None], prompt.base)

    @property
    def lengths(self) -> jax.Array:
        return self.base.lengths

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def attend(
        self,
        q: Float[Array, "R T N H"],
        k: Float[Array, "R T C X"],
        v: Float[Array, "R T C Y"],
        positions: Int[Array, "R T"],
        spec: AttentionSpec,
        expand: Expand | None = None,
    ) -> tuple[Float[Array, "R T N Y"], HeadMask]:
        """See `Cache.attend`; the R rows are the copies, one batch after the other."""
        k = k if expand is None else expand(k, positions)
        B = self.keys.shape[0]
        slots = jnp.arange(self.keys.shape[2], dtype=jnp.int32)
        kept = jnp.broadcast_to(self.kept, (q.shape[0] // B, *self.kept.shape[1:]))

        def one(copy: Any) -> jax.Array:
            q, k, v, at, kept = copy
            keys, values = (
                jnp.concatenate([held, jnp.swapaxes(new, 1, 2)], axis=2)
                for held, new in ((self.keys, k), (self.values, v))
            )
            own = jnp.broadcast_to(at[:, None], (*kept.shape[:2], at.shape[1]))
            held = jnp.concatenate([jnp.where(kept, slots[None, None], -1), own], axis=2)
            weights = attention_weights(q, at, keys, held, spec)
            rows = weights.reshape(B, values.shape[1], -1, values.shape[2]).astype(values.dtype)
            out = jnp.matmul(rows, values, preferred_element_type=jnp.float32)
            out = out.reshape(B, q.shape[2], q.shape[1], -1)
            return jnp.swapaxes(out, 1, 2).astype(q.dtype)

        copies = jax.tree.map(lambda x: x.reshape(-1, B, *x.shape[1:]), (q, k, v, positions))
        out = jax.lax.map(one, (*copies, kept))
        return out.reshape(-1, *out.shape[2:]), self

    def attend_absorbed(
        self,
        q_latent: Float[Array, "R T N L"],
        q_rope: Float[Array, "R T N X"],
        latent: Float[Array, "R T L"],
        k_rope: Float[Array, "R T X"],
        positions: Int[Array, "R T"],
        spec: AttentionSpec,
    ) -> tuple[Float[Array, "R T N L"], HeadMask]:
        """See `LatentCache.attend_absorbed`."""
        R, T, L = latent.shape
        new = LatentCache.create(R, T, L, k_rope.shape[-1], latent.dtype)
        new = new.append(latent, k_rope, positions)
        k, v = (jnp.swapaxes(part, 1, 2) for part in new.keys_and_values(latent.dtype))
        out, _ = self.attend(self.base.joint(q_latent, q_rope), k, v, positions, spec)
        return out[..., :L], self
