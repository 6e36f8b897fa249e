"""One optimizer step: state, loss, accuracy of whole answers."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from kvjax.nn import Transformer


@flax.struct.dataclass
class TrainState:
    """All that a step changes.

    Attributes:
        params, opt_state: model and optimizer.
        correct, asked: fp32 [kinds] whole answers that were right and questions that were put,
            since the counters were last reset.
        loss: fp32 sum of the losses since then.
    """

    params: Any
    opt_state: Any
    correct: Float[Array, " kinds"]
    asked: Float[Array, " kinds"]
    loss: Float[Array, ""]

    def reset(self) -> TrainState:
        """The same state with counters at zero."""
        return dataclasses.replace(self, **_counters(self.correct.shape[0]))


def create_state(params: Any, optimizer: optax.GradientTransformation, kinds: int) -> TrainState:
    """The state before the first step."""
    return TrainState(params, optimizer.init(params), **_counters(kinds))


def _counters(kinds: int) -> dict[str, jax.Array]:
    # Buffers of their own: the step donates them.
    return {
        "correct": jnp.zeros((kinds,), jnp.float32),
        "asked": jnp.zeros((kinds,), jnp.float32),
        "loss": jnp.zeros((), jnp.float32),
    }


def make_optimizer(weight_decay: float, b2: float, clip: float) -> optax.GradientTransformation:
    """AdamW up to its learning rate (a step's argument); norm weights stay as they are."""

    def label(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "frozen" if "norm" in str(path[-1].key) else "trained", params
        )

    adamw = optax.chain(
        optax.clip_by_global_norm(clip),
        optax.scale_by_adam(b2=b2),
        optax.add_decayed_weights(weight_decay),
    )
    return optax.partition({"trained": adamw, "frozen": optax.set_to_zero()}, label)


def answer_loss(
    logits: Float[Array, "B T V"],
    targets: Int[Array, "B T"],
    question: Int[Array, "B T"],
    text_weight: float,
) -> Float[Array, ""]:
    """Cross-entropy: weight 1 on the tokens of answers, `text_weight` on all others."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    weights = jnp.where(question >= 0, 1.0, text_weight)
    return jnp.sum(losses * weights) / jnp.sum(weights)


def count_answers(
    logits: Float[Array, "B T V"],
    targets: Int[Array, "B T"],
    question: Int[Array, "B T"],
    kind: Int[Array, "B Q"],
    kinds: int,
) -> tuple[Float[Array, " kinds"], Float[Array, " kinds"]]:
    """Answers that are right in every token, and questions, by kind.

    Teacher-forced: an answer counts exactly when greedy decoding would write it.
    """
    wrong = (jnp.argmax(logits, axis=-1) != targets) & (question >= 0)
    rows = jnp.arange(kind.shape[0], dtype=jnp.int32)[:, None]
    errors = (
        jnp.zeros(kind.shape, jnp.int32)
        .at[rows, question]
        .add(wrong.astype(jnp.int32), mode="drop")
    )
    of_kind = kind[..., None] == jnp.arange(kinds, dtype=jnp.int32)[None, None]
    right = of_kind & (errors == 0)[..., None]
    return (
        jnp.sum(right, axis=(0, 1)).astype(jnp.float32),
        jnp.sum(of_kind, axis=(0, 1)).astype(jnp.float32),
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def train_step(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    text_weight: float,
    state: TrainState,
    learning_rate: Float[Array, ""],
    tokens: Int[Array, "B _"],
    question: Int[Array, "B T"],
    kind: Int[Array, "B Q"],
) -> TrainState:
    """The state after one batch (see `episodes.Batch`)."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]

    def loss_and_logits(params):
        logits, _ = model.apply({"params": params}, inputs)
        return answer_loss(logits, targets, question, text_weight), logits

    (loss, logits), grads = jax.value_and_grad(loss_and_logits, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    updates = jax.tree.map(lambda u: -learning_rate * u, updates)
    correct, asked = count_answers(logits, targets, question, kind, state.correct.shape[0])
    return TrainState(
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
        correct=state.correct + correct,
        asked=state.asked + asked,
        loss=state.loss + loss,
    )
