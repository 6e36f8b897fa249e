"""Many policies judged from one reading of the prompts: what a policy drops is hidden, not removed.

`kvjax.scoring.compare` compresses a cache for each policy and feeds the answers to each. Here the
prompts are read once, and all policies are judged as rows of one batch, from the prompts' whole
keys and values, with the dropped tokens masked for each head (`kvjax.headkv.need.HeadMask`). The
answers see the same tokens in both ways (tests/benchmarks/test_headkv_real.py).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from kvjax.cache import AttentionSpec, PrefillCache
from kvjax.example import Example
from kvjax.feeding import judge
from kvjax.headkv.need import HeadMask, Reading, answer_steps
from kvjax.nn import Transformer
from kvjax.nn.transformer import block_kinds, embed
from kvjax.policies.policy import Compress
from kvjax.policies.scorers import LayerView, queries_seen
from kvjax.policies.selection import Ranking, rank_heads
from kvjax.prefilling import bucket_length, pad, read_layer


def right_answers(
    model: Transformer,
    params: Any,
    examples: Sequence[Example],
    policies: Mapping[str, Compress],
    steps: int,
    given: Sequence[int] = (),
) -> dict[str, np.ndarray]:
    """[examples] bool by policy, "full" first: whether every token of an answer is the likeliest.

    The end of the sequence is one of them where the example says so.

    Args:
        policies: of one number of observed tokens; no scorer has an observer.
        steps: tokens to which answers are padded, so that few programs are compiled.
        given: for each example the number of first tokens of the answer that are not judged; ()
            for none.
    """
    config, dtype = model.config, params["embedding"].dtype
    examples = [replace(e, answer=(*e.answer, *config.eos_ids[: e.then_eos])) for e in examples]
    longest = max(len(example.prompt) for example in examples)
    tokens, sizes = pad([e.prompt for e in examples], bucket_length(longest))
    lengths = jnp.asarray(sizes)
    total, recents = lengths + np.int32(steps), next(iter(policies.values())).observed
    recent = np.full(len(examples), recents, np.int32)
    queries = max(queries_seen(p.scorer, recents) for p in policies.values())
    # [V, B, L, K] budgets, of every policy for every prompt.
    caps = np.stack([[p.caps(config, int(n), dtype)[0] for n in sizes] for p in policies.values()])
    x, masks, prompts = embed(config, params, tokens), [], []
    for index, kind in enumerate(block_kinds(config)):
        spec = kind.block.layer.attention.spec
        own = params[f"layers_{index}"]
        x, prompt = read_layer(kind.block, own, kind.pairs, x, lengths, total, observed=queries)
        kept = [everything(prompt, spec)]
        rankings: dict[Any, Ranking] = {}
        for policy, own_caps in zip(policies.values(), caps[:, :, index], strict=True):
            if policy.scorer not in rankings:
                settings = {"scorer": policy.scorer, "spec": spec}
                settings["observed"] = queries_seen(policy.scorer, recents)
                rankings[policy.scorer] = rank_heads(prompt, recent, **settings, placement=None)
            ranking = rankings[policy.scorer]
            kept.append(chosen(prompt, ranking, recent, own_caps, policy.sharing, spec))
        prompts.append(prompt.seen_by(None))
        masks.append(HeadMask.create(prompts[-1], spec, lengths, jnp.stack(kept)))
    fed, positions, wanted = (padded(part, steps) for part in answer_steps(examples))
    for row, count in zip(wanted, given, strict=bool(given)):
        row[:count] = -1
    reading = Reading(block_kinds(config), prompts, [], fed, positions, wanted, lengths, total)
    x = embed(config, params, np.maximum(fed, 0))
    x = jnp.tile(x, (len(policies) + 1, 1, 1))
    x = reading.layers(params, x, 0, masks)[-1]
    wanted = np.tile(wanted, (len(policies) + 1, 1))
    _, likely = judge(model, params, x, wanted)
    right = ((np.asarray(likely) == wanted) | (wanted < 0)).all(axis=1)
    return dict(zip(["full", *policies], right.reshape(-1, len(examples)), strict=True))


def padded(rows: Int[np.ndarray, "B M"], steps: int) -> Int[np.ndarray, "B steps"]:
    """The rows with −1 up to `steps`."""
    return np.pad(rows, ((0, 0), (0, steps - rows.shape[1])), constant_values=-1)


@functools.partial(jax.jit, static_argnames="spec")
def everything(prompt: PrefillCache, spec: AttentionSpec) -> Bool[Array, "B K S"]:
    """All tokens of the prompts."""
    view = LayerView.create(prompt, spec)
    return jnp.broadcast_to(view.positions >= 0, view.keys.shape[:3])


@functools.partial(jax.jit, static_argnames=("sharing", "spec"))
def chosen(
    prompt: PrefillCache,
    ranking: Ranking,
    recent: Int[Array | np.ndarray, " B"],
    caps: Int[Array | np.ndarray, "B K"],
    sharing: Any,
    spec: AttentionSpec,
) -> Bool[Array, "B K S"]:
    """The tokens that a policy keeps, the recent ones included."""
    view = LayerView.create(prompt, spec, jnp.asarray(recent))
    B, K, S = ranking.scores.shape
    available = jnp.sum(view.candidates, axis=2, dtype=jnp.int32)
    counts = jnp.minimum(jnp.asarray(caps), available)
    if sharing is not None:
        counts = sharing(ranking.scores, view.candidates, jnp.asarray(caps))
    best = ranking.select(view.candidates, counts)
    rows, heads = (jnp.arange(n, dtype=jnp.int32) for n in (B, K))
    kept = jnp.zeros((B, K, S), bool)
    # In the places beyond a head's number `select` has S, which no slot has: it is dropped.
    kept = kept.at[rows[:, None, None], heads[None, :, None], best].set(True, mode="drop")
    slots = jnp.arange(S, dtype=jnp.int32)[None]
    last = (slots >= (view.lengths - recent)[:, None]) & (slots < view.lengths[:, None])
    return kept | last[:, None]
