"""Measures the importance of each head on examples: by its attention, or by the gradient of the
answer's loss.

`score_heads` makes the examples with a tokenizer; `score_examples` takes examples. In these
two names, in `load_scores` and in `kvjax score`, a score is the importance of a head.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int

from kvjax.cache import NoCache
from kvjax.cache.dense import start_prefill
from kvjax.checks import token_ids
from kvjax.config import ModelConfig
from kvjax.example import Example
from kvjax.feeding import not_finite
from kvjax.headkv.examples import (
    Batch,
    Grid,
    Reduce,
    attended,
    bucketed,
    copied,
    induced,
    make_batch,
    make_examples,
    positions,
    step_positions,
)
from kvjax.mesh import automatic_axes, on_automatic_mesh
from kvjax.nn import Transformer
from kvjax.nn.checks import check_fits
from kvjax.nn.transformer import (
    NO_TOKEN,
    Block,
    apply_block,
    block_kinds,
    embed,
    hidden_logits,
    most_likely,
    output_params,
    run_layer,
)
from kvjax.paths import local_path
from kvjax.policies.importance import HeadScores
from kvjax.policies.need import NeedCurves
from kvjax.policies.scorers import LayerView, query_attention
from kvjax.text import rouge1_recall, token_f1

Measured = TypeVar("Measured", HeadScores, NeedCurves)

Measure = Callable[[Transformer, Any, Batch], tuple[jax.Array, jax.Array]]
"""Maps model, params and batch to the importance of every head [B, L, N] and the most likely token
at each step [B, M], −1 where the logits are not finite."""


class Estimator(NamedTuple):
    """How importance is measured on an example, and which examples count.

    Attributes:
        measure: see `Measure`.
        answer_score: quality of the predicted answer, given the predicted and the right tokens.
        accept_above: an example counts if its answer score exceeds this number.
        needs_span: whether `measure` reads the examples' spans.
    """

    measure: Measure
    answer_score: Callable[[Sequence[int], Sequence[int]], float]
    accept_above: float = 0.5
    needs_span: bool = True


@dataclass(frozen=True, eq=False)
class BatchImportance:
    """Measurements on one batch of examples.

    Attributes:
        indices: the examples, as indices into the caller's list.
        heads: [n, L, N] importance of the heads.
        answers: [n] quality of each answer.
    """

    indices: tuple[int, ...]
    heads: Float64[np.ndarray, "n L N"]
    answers: Float64[np.ndarray, " n"]


def score_heads(
    model: Transformer,
    params: Any,
    tokenizer: Any,
    estimator: str = "retrieval_reasoning",
    samples: int = 64,
    length: int = 512,
    seed: int = 0,
    batch_size: int = 8,
    haystack: str | Path | None = None,
) -> HeadScores:
    """Importance of every query head, from examples in the model's own tokens.

    To measure it on your own examples, use `score_examples`.

    Args:
        tokenizer: from `kvjax.load_tokenizer`.
        estimator: "retrieval", "retrieval_reasoning" or "enhanced_retrieval" count the examples
            that the model answers; "copying" is for models that cannot answer questions;
            "gradient" is the sensitivity of the loss of the answer.
        samples, length, seed, haystack: see `Grid`.
        batch_size: examples at a time.

    Raises:
        ValueError: an unknown estimator, a length that cannot hold the facts, no example that
            the model answers, or a haystack that is missing or too short.
    """
    path = None if haystack is None else local_path(haystack, "the haystack")
    grid = Grid(estimator, samples, length, seed, path)
    examples = make_examples(tokenizer, grid)
    scores = score_examples(model, params, examples, estimator=estimator, batch_size=batch_size)
    return with_origin(scores, model, grid)


def with_origin(found: Measured, model: Transformer, grid: Grid) -> Measured:
    """Head scores or need curves with the model and the grid in their metadata."""
    origin: dict[str, Any] = {"model": model_name(model), "seed": grid.seed, "length": grid.length}
    if grid.haystack is not None:
        origin["haystack"] = grid.haystack.name
    return dataclasses.replace(found, meta=found.meta | origin)


def model_name(model: Transformer) -> str:
    """The last part of the checkpoint's path."""
    return Path(model.config.source).name


@automatic_axes()
def score_examples(
    model: Transformer,
    params: Any,
    examples: Sequence[Example],
    estimator: str | Estimator = "retrieval_reasoning",
    batch_size: int = 8,
    finished: Iterable[BatchImportance] = (),
    on_batch: Callable[[BatchImportance], None] | None = None,
) -> HeadScores:
    """Importance of every query head, one number for each example that counts.

    Args:
        examples: prompts with their answers and the answers' places in the prompts.
        estimator: a name of ESTIMATORS, or an `Estimator`.
        batch_size: examples at a time.
        finished: batches of an earlier, interrupted call with the same arguments; these are not
            measured again.
        on_batch: called with each new batch.

    Returns:
        Importance, whose meta lists every sample: name, length, depth, answer score, accepted.

    Raises:
        ValueError: an unknown estimator, no example, a span outside its prompt, a token outside the
            vocabulary, importance or logits that are not finite, or no example that counts.
    """
    check_fits(model, params)
    name, chosen = _estimator(estimator)
    check_examples(examples, chosen.needs_span, model.config)
    params = on_automatic_mesh(params)
    # Measure the batches that an earlier call did not finish.
    done = {batch.indices: batch for batch in finished}
    batches = [tuple(indices) for indices in bucketed(examples, batch_size)]
    todo = [indices for indices in batches if indices not in done]
    for batch in measure_batches(model, params, examples, chosen, todo, batch_size):
        done[batch.indices] = batch
        if on_batch is not None:
            on_batch(batch)
    # Collect the importance in the order of the examples, and keep the examples that count.
    config = model.config
    heads = np.zeros((len(examples), config.num_layers, config.query_heads))
    answers = np.zeros(len(examples))
    for indices in batches:
        heads[list(indices)] = done[indices].heads
        answers[list(indices)] = done[indices].answers
    accepted = answers > chosen.accept_above
    if not accepted.any():
        raise ValueError(
            f"the model answers none of {len(examples)} examples (best score {answers.max():.2f}, "
            f"expected > {chosen.accept_above}), so no head has an importance; "
            "the estimators copying and gradient need no right answers"
        )
    meta = {
        "estimator": name,
        "num_layers": heads.shape[1],
        "num_heads": heads.shape[2],
        "num_kv_heads": model.config.budget_heads,
        "samples": [
            provenance(*row) for row in zip(examples, answers.tolist(), accepted, strict=True)
        ],
    }
    return HeadScores(np.moveaxis(heads[accepted], 0, 2), meta)


def measure_batches(
    model: Transformer,
    params: Any,
    examples: Sequence[Example],
    estimator: Estimator,
    batches: Sequence[tuple[int, ...]],
    batch_size: int,
) -> Iterator[BatchImportance]:
    """Measures batches of examples, which are given by their indices."""
    steps = max(len(example.answer) for example in examples)
    for indices in batches:
        chunk = [examples[i] for i in indices]
        values, predicted = estimator.measure(model, params, make_batch(chunk, steps, batch_size))
        # Rows beyond `chunk` are copies of the last example, which fill the batch.
        heads = np.asarray(values, np.float64)[: len(chunk)]
        said = [
            row[steps - len(example.answer) :].tolist()
            for example, row in zip(chunk, np.asarray(predicted), strict=False)
        ]
        for index, answer, importance in zip(indices, said, heads, strict=True):
            if NO_TOKEN in answer or not np.isfinite(importance).all():
                what = f"the measurements of example {index}"
                raise not_finite(what, model, params, examples[index].prompt)
        answers = [
            estimator.answer_score(answer, example.answer)
            for answer, example in zip(said, chunk, strict=True)
        ]
        yield BatchImportance(indices, heads, np.asarray(answers, np.float64))


def batch_importance(
    model: Transformer, params: Any, batch: Batch, reduce: Reduce
) -> tuple[Float[Array, "B L N"], Int[Array, "B M"]]:
    """Importance of every head, and the most likely token at each step."""
    x = embed(model.config, params, batch.tokens)
    importance = []
    for index, kind in enumerate(block_kinds(model.config)):
        own = params[f"layers_{index}"]
        x, of_heads = layer_importance(kind.block, reduce, own, kind.pairs, x, batch)
        importance.append(of_heads)
    top = {name: params[name] for name in output_params(model.config)}
    return jnp.stack(importance, axis=1), expected_tokens(model.config, top, x, batch)


@functools.partial(jax.jit, static_argnames=("block", "reduce"), donate_argnames="x")
def layer_importance(
    block: Block,
    reduce: Reduce,
    params: Any,
    pairs: Any,
    x: Float[Array, "B S D"],
    batch: Batch,
) -> tuple[Float[Array, "B S D"], Float[Array, "B N"]]:
    """One layer's output and the importance of its heads; all layers of a kind share this program.

    Args:
        block, params, pairs: see `apply_block`.
    """
    B, S = batch.tokens.shape
    attention = block.layer.attention
    # The prefill cache keeps the queries of the answer's steps: the last rows of each sequence.
    cache = start_prefill(attention, B, S, batch.steps.shape[1], x.dtype)
    x, cache = apply_block(block, params, pairs, x, positions(batch), cache, batch.lengths)
    return x, reduce(query_attention(LayerView.create(cache, attention.spec)), batch)


@functools.partial(jax.jit, static_argnames="config")
def expected_tokens(
    config: ModelConfig, params: Any, x: Float[Array, "B S D"], batch: Batch
) -> Int[Array, "B M"]:
    """The most likely token at each step of the answer, computed from the last layer's output."""
    x = jnp.take_along_axis(x, step_positions(batch)[..., None], axis=1)
    return most_likely(hidden_logits(config, params, x))


def attention_estimator(reduce: Reduce, **rest: Any) -> Estimator:
    """An estimator that reduces the attention of the answer's steps; see `Estimator`."""
    return Estimator(functools.partial(batch_importance, reduce=reduce), **rest)


def provenance(example: Example, score: float, accepted: np.bool_) -> dict[str, Any]:
    """The entry of one sample in the meta file."""
    return {
        "name": example.name,
        "length": len(example.prompt),
        "depth": example.depth,
        "score": score,
        "accepted": bool(accepted),
    }


def check_examples(examples: Sequence[Example], with_span: bool, config: ModelConfig) -> None:
    """Raises ValueError for examples that this model cannot be measured on."""
    if not examples:
        raise ValueError("got no examples, expected at least one")
    for index, example in enumerate(examples):
        if not isinstance(example, Example):
            raise ValueError(
                f"example {index} is {type(example).__name__}, expected a kvjax.Example"
            )
        if not example.prompt or not example.answer:
            raise ValueError(
                f"example {index} has {len(example.prompt)} prompt and {len(example.answer)} "
                "answer tokens, expected at least one of each"
            )
        token_ids([*example.prompt, *example.answer], config.vocab_size, f"example {index}")
        if len(example.prompt) > config.context_length:
            raise ValueError(
                f"example {index} has {len(example.prompt)} prompt tokens, expected at most "
                f"{config.context_length}: the model's context"
            )
        start, end = example.span
        if with_span and not 0 <= start < end <= len(example.prompt):
            raise ValueError(
                f"example {index} has span {example.span}, expected the place (start, end) of the "
                f"answer in its {len(example.prompt)} tokens; the estimator gradient needs none"
            )


def _estimator(estimator: str | Estimator) -> tuple[str, Estimator]:
    if not isinstance(estimator, str):
        return "custom", estimator
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator is {estimator!r}, expected one of {', '.join(ESTIMATORS)}")
    return estimator, ESTIMATORS[estimator]


@functools.partial(jax.jit, static_argnames="model")
def loss_gradient(
    model: Transformer, params: Any, batch: Batch
) -> tuple[Float[Array, "B L N"], Int[Array, "B M"]]:
    """|∂loss/∂gate| of every head and example, and the most likely token at each step.

    Processes one example at a time and recomputes its layers in the backward pass. Besides the
    parameters, memory holds one layer's activations and gated output projections.
    """
    gradient = jax.grad(answer_loss, has_aux=True)
    gates = jnp.ones((model.config.num_layers, model.config.query_heads), jnp.float32)

    def one(index: jax.Array) -> tuple[jax.Array, jax.Array]:
        row = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, index, 1), batch)
        slope, predicted = gradient(gates, model, params, row)
        return jnp.abs(slope), predicted[0]

    return jax.lax.map(one, jnp.arange(batch.tokens.shape[0], dtype=jnp.int32))


def answer_loss(
    gates: Float[Array, "L N"], model: Transformer, params: Any, batch: Batch
) -> tuple[Float[Array, ""], Int[Array, "B M"]]:
    """Cross-entropy of the answers under gated heads, and the most likely token at each step.

    The loss is the mean over an answer's tokens, summed over the examples, in nats.
    """
    at = positions(batch)
    x = embed(model.config, params, batch.tokens)
    for index, kind in enumerate(block_kinds(model.config)):
        # Recompute each layer in the backward pass: only its input is stored.
        @jax.checkpoint
        def layer(own: Any, x: jax.Array, gates_N: jax.Array, kind: Any = kind) -> jax.Array:
            gated = gate_heads(own, gates_N)
            return run_layer(kind, gated, x, at, NoCache(), batch.lengths)[0]

        x = layer(params[f"layers_{index}"], x, gates[index])
    # Only the steps need logits, and only real steps count for the loss.
    x = jnp.take_along_axis(x, step_positions(batch)[..., None], axis=1)
    logits = hidden_logits(model.config, params, x)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    loss = -jnp.take_along_axis(log_p, batch.answers[..., None], axis=-1)[..., 0]
    sizes = jnp.sum(batch.steps, axis=1, dtype=jnp.int32).astype(jnp.float32)
    loss = jnp.sum(jnp.where(batch.steps, loss, 0.0), axis=1) / sizes
    return jnp.sum(loss), most_likely(logits)


def gate_heads(params: Any, gates: Float[Array, " N"]) -> Any:
    """The parameters of a layer with the output of every head multiplied by its gate."""
    attention = params["attn"]
    # Scaling a head's rows of the output projection scales the head's output.
    output = attention["o"].astype(jnp.float32) * gates[:, None, None]
    return params | {"attn": attention | {"o": output.astype(attention["o"].dtype)}}


ESTIMATORS = {
    "retrieval": attention_estimator(copied, answer_score=rouge1_recall),
    "retrieval_reasoning": attention_estimator(attended, answer_score=token_f1),
    "enhanced_retrieval": attention_estimator(attended, answer_score=token_f1),
    "copying": attention_estimator(induced, answer_score=token_f1, accept_above=-1.0),
    "gradient": Estimator(loss_gradient, token_f1, accept_above=-1.0, needs_span=False),
}
"""The three formulas of the HeadKV paper ("enhanced_retrieval" is "retrieval_reasoning" on other
examples: plain needles instead of reasoning), and two for which every example counts, answered or
not. The paper decodes the answers; here they are teacher-forced."""
