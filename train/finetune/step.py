"""One optimizer step on the trainable part; nothing of the frozen part has a gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from kvjax.nn import Transformer
from train.finetune.labels import Flat, unflatten
from train.finetune.loss import Batch, Sums, hidden, token_sums


@flax.struct.dataclass
class TuneState:
    """All that a step changes.

    Attributes:
        params: fp32 masters of what trains, flat: path → array.
        opt_state: of the optimizer, for these only.
    """

    params: Any
    opt_state: Any


@dataclass(frozen=True)
class TuneStep:
    """What does not change during a run; hashable, the static argument of the jitted step.

    Attributes:
        model: the model that trains.
        optimizer: up to the learning rate, which is an argument of the step.
        dtype: of activations and of the weights in products; what trains is cast in every step.
        accumulate: micro-batches a step; the batch's first axis is divided by it.
        remat, place: see `loss.hidden`.
        teacher: the original model, for distillation.
        distill: weight of KL(teacher ‖ model) beside cross-entropy.
    """

    model: Transformer
    optimizer: optax.GradientTransformation
    dtype: str = "bfloat16"
    accumulate: int = 1
    remat: bool = False
    place: NamedSharding | None = None
    teacher: Transformer | None = None
    distill: float = 0.0

    def init(self, trainable: Flat) -> TuneState:
        """The state before the first step: fp32 copies of what trains, moments beside them."""
        masters = {path: jnp.array(leaf, jnp.float32) for path, leaf in trainable.items()}
        places = state_shardings(self.optimizer, masters).opt_state
        return TuneState(masters, jax.jit(self.optimizer.init, out_shardings=places)(masters))

    def __call__(
        self,
        state: TuneState,
        frozen: Flat,
        batch: Batch,
        rate: Float[Array, ""],
        teacher_params: Any = None,
    ) -> tuple[TuneState, dict[str, jax.Array]]:
        """The state after one batch, and its metrics (fp32 scalars).

        Args:
            frozen: in the compute dtype; read, never written.
            rate: learning rate of this step.

        Returns:
            metrics: loss (cross-entropy, mean over learned targets), accuracy of teacher-forced
            tokens, divergence, grad_norm (before clipping), learned (targets), tokens.
        """
        parts = _split_batch(batch, self.accumulate)
        # Weights sum to the same number whatever the parameters: the mean's divisor.
        total = jnp.maximum(jnp.sum(batch["weights"]), 1.0)

        def loss(masters: Flat, part: Batch) -> tuple[jax.Array, Sums]:
            sums = self.sums(masters, frozen, part, teacher_params)
            return (sums.loss + self.distill * sums.divergence) / total, sums

        gradient = jax.grad(loss, has_aux=True)

        def add(carry: Any, part: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, carry, gradient(state.params, part)), None

        if self.accumulate == 1:
            grads, sums = gradient(state.params, jax.tree.map(lambda leaf: leaf[0], parts))
        else:
            zeros = jax.tree.map(jnp.zeros_like, state.params)
            zero = Sums(*(jnp.zeros((), jnp.float32) for _ in Sums._fields))
            (grads, sums), _ = jax.lax.scan(add, (zeros, zero), parts)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
            updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        updates = jax.tree.map(lambda u: -rate * u, updates)
        metrics = {
            "loss": sums.loss / total,
            "accuracy": sums.correct / total,
            "divergence": sums.divergence / total,
            "grad_norm": optax.tree.norm(grads),
            "learned": jnp.sum(batch["weights"] > 0).astype(jnp.float32),
            "tokens": jnp.sum(batch["positions"] >= 0).astype(jnp.float32),
        }
        stepped: Any = optax.apply_updates(state.params, updates)
        return TuneState(stepped, opt_state), metrics

    def sums(self, masters: Flat, frozen: Flat, batch: Batch, teacher_params: Any = None) -> Sums:
        """Losses of a batch; part of the step, and what an evaluation calls: a program a block."""
        cast = {path: leaf.astype(self.dtype) for path, leaf in masters.items()}
        params = unflatten({**frozen, **cast})
        x = hidden(self.model, params, batch, self.remat, self.place)
        teacher = None
        if self.teacher is not None:
            seen = hidden(self.teacher, teacher_params, batch, False, self.place)
            teacher = self.teacher, teacher_params, jax.lax.stop_gradient(seen)
        return token_sums(self.model, params, x, batch, teacher, self.place)


def _split_batch(batch: Mapping[str, jax.Array], parts: int) -> dict[str, jax.Array]:
    """[B, T] → [parts, B / parts, T]; micro-batch i takes rows i, i + parts, …, which leaves
    rows where they are when the batch is split over devices."""
    return {
        name: jnp.swapaxes(leaf.reshape(-1, parts, *leaf.shape[1:]), 0, 1)
        for name, leaf in batch.items()
    }


def state_shardings(optimizer: optax.GradientTransformation, masters: Flat) -> TuneState:
    """Where a state lies: moments as their parameters, all else on every device.

    Args:
        masters: arrays, or shapes with shardings.
    """
    places = {path: leaf.sharding for path, leaf in masters.items()}
    one = next(iter(places.values()))
    everywhere = NamedSharding(one.mesh, PartitionSpec()) if isinstance(one, NamedSharding) else one
    opt_state = optax.tree.map_params(
        optimizer,
        lambda _, place: place,
        jax.eval_shape(optimizer.init, masters),
        places,
        transform_non_params=lambda _: everywhere,
    )
    return TuneState(places, opt_state)


class CompiledStep(NamedTuple):
    """A step for arrays of certain shapes and shardings.

    Attributes:
        call: (state, frozen, batch, rate, teacher_params) → (state, metrics); donates the state. A
            `jax.stages.Compiled`, which has a memory analysis.
        flops: of one device; None where the backend does not say.
    """

    call: Any
    flops: float | None


def compile_step(
    step: TuneStep, state: TuneState, frozen: Flat, batch: Batch, rate: Any, teacher: Any = None
) -> CompiledStep:
    """Compiles a step ahead of its first call.

    Args:
        state, frozen, batch, rate, teacher: arrays, or shapes with shardings. The new state lies
            as the old one does.
    """
    places = state_shardings(step.optimizer, state.params)
    run = jax.jit(step, donate_argnums=0, out_shardings=(places, None))
    compiled = run.lower(state, frozen, batch, rate, teacher).compile()
    cost = compiled.cost_analysis() or {}
    return CompiledStep(compiled, cost.get("flops"))


def adamw(b1: float, b2: float, weight_decay: float, clip: float) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) after clipping, up to its learning rate.

    Args:
        clip: largest global norm of the gradient.
    """
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.scale_by_adam(b1=b1, b2=b2),
        optax.add_decayed_weights(weight_decay),
    )


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over `warmup` · steps, then a cosine to zero.

    Args:
        step: the step that is about to be taken, from 0.
    """
    first = max(1, round(warmup * steps))
    if step < first:
        return peak * (step + 1) / first
    return peak * 0.5 * (1 + math.cos(math.pi * (step - first) / max(1, steps - first)))
