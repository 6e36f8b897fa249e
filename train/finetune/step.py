"""One optimizer step on the parameters that train; frozen parameters have no gradient.

Parameters are flat dicts here, so that the trainable ones can be told from the frozen ones by path.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from kvjax.nn import Transformer
from train.finetune.loss import LossSums, PackedBatch, hidden, sum_losses

Flat = dict[str, Any]
"""Parameters by path, such as "layers_0/attn/k_up"."""


@flax.struct.dataclass
class TuneState:
    """Everything that a step changes.

    Attributes:
        params: `Flat` parameters that train, in fp32.
        opt_state: the optimizer's state, for these parameters only.
    """

    params: Any
    opt_state: Any


@dataclass(frozen=True)
class TuneStep:
    """Everything that stays the same during a run. Hashable: the static part of the jitted step.

    Attributes:
        model: the model that trains.
        optimizer: without the learning rate, which is an argument of each step.
        dtype: of activations, and of weights in products; each step casts the fp32 parameters.
        accumulate: number of micro-batches that the batch is divided into.
        remat, sharding: see `loss.hidden`.
        teacher: the original model, for distillation.
        distill: weight of KL(teacher ‖ model); cross-entropy has weight 1.
    """

    model: Transformer
    optimizer: optax.GradientTransformation
    dtype: str
    accumulate: int = 1
    remat: bool = False
    sharding: NamedSharding | None = None
    teacher: Transformer | None = None
    distill: float = 0.0

    def init(self, trainable: Flat) -> TuneState:
        """The state before the first step: fp32 copies, and moments with the same shardings."""
        masters = {path: jnp.array(leaf, jnp.float32) for path, leaf in trainable.items()}
        shardings = state_shardings(self.optimizer, masters).opt_state
        return TuneState(masters, jax.jit(self.optimizer.init, out_shardings=shardings)(masters))

    def __call__(
        self,
        state: TuneState,
        frozen: Flat,
        batch: PackedBatch,
        rate: Float[Array, ""],
        teacher_params: Any = None,
    ) -> tuple[TuneState, dict[str, jax.Array]]:
        """The state after one batch, and the batch's metrics.

        Args:
            frozen: parameters that don't train, in `dtype`; never changed.
            rate: learning rate of this step.
            teacher_params: parameters of the teacher, if there is one.

        Returns:
            (state, metrics). Metrics are fp32 scalars: loss (cross-entropy, mean over learned
            targets), accuracy of teacher-forced tokens, divergence, grad_norm (before clipping),
            learned (number of targets), tokens (number of tokens).
        """
        parts = _split_batch(batch, self.accumulate)
        # The divisor of all means does not depend on parameters, so micro-batches can be summed.
        total = jnp.maximum(jnp.sum(batch["weights"]), 1.0)

        def loss(masters: Flat, part: PackedBatch) -> tuple[jax.Array, LossSums]:
            sums = self.losses(masters, frozen, part, teacher_params)
            return (sums.loss + self.distill * sums.divergence) / total, sums

        # Only `masters` is differentiated: no gradient of a frozen parameter exists.
        gradient = jax.grad(loss, has_aux=True)

        def add(carry: Any, part: PackedBatch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, carry, gradient(state.params, part)), None

        # Gradients and sums of all micro-batches, added up in fp32.
        if self.accumulate == 1:
            grads, sums = gradient(state.params, jax.tree.map(lambda leaf: leaf[0], parts))
        else:
            zeros = jax.tree.map(jnp.zeros_like, state.params)
            zero = LossSums(*(jnp.zeros((), jnp.float32) for _ in LossSums._fields))
            (grads, sums), _ = jax.lax.scan(add, (zeros, zero), parts)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
            updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        # The rate is an argument, so that a schedule needs no program of each step.
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

    def losses(
        self, masters: Flat, frozen: Flat, batch: PackedBatch, teacher_params: Any = None
    ) -> LossSums:
        """Losses of a batch. Outside of the step, each kind of layer is one program.

        Args:
            masters: parameters that train, in fp32.
            frozen, teacher_params: see `__call__`.
        """
        cast = {path: leaf.astype(self.dtype) for path, leaf in masters.items()}
        params = unflatten({**frozen, **cast})
        x = hidden(self.model, params, batch, self.remat, self.sharding)
        teacher = None
        if self.teacher is not None:
            # The teacher has no backward pass, so nothing needs to be rematerialised.
            seen = hidden(self.teacher, teacher_params, batch, False, self.sharding)
            teacher = self.teacher, teacher_params, jax.lax.stop_gradient(seen)
        return sum_losses(self.model, params, x, batch, teacher, self.sharding)


def _split_batch(batch: Mapping[str, jax.Array], parts: int) -> dict[str, jax.Array]:
    """[B, T] → [parts, B / parts, T]. Micro-batch i takes rows i, i + parts, …

    With this order no row moves to another device where the batch axis is sharded.
    """
    return {
        name: jnp.swapaxes(leaf.reshape(-1, parts, *leaf.shape[1:]), 0, 1)
        for name, leaf in batch.items()
    }


def flatten(params: Mapping[str, Any]) -> Flat:
    """Nested parameters as a flat dict; paths are joined with "/"."""
    return flatten_dict(dict(params), sep="/")


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    return unflatten_dict(dict(flat), sep="/")


def merged(state: TuneState, frozen: Flat, dtype: str) -> dict:
    """All parameters, nested and cast to one dtype."""
    trained = {path: leaf.astype(dtype) for path, leaf in state.params.items()}
    return unflatten({**{path: leaf.astype(dtype) for path, leaf in frozen.items()}, **trained})


def state_shardings(optimizer: optax.GradientTransformation, masters: Flat) -> TuneState:
    """Shardings of a state: moments as their parameters, counters on every device.

    Args:
        masters: parameters that train, as arrays or as shapes with shardings.
    """
    shardings = {path: leaf.sharding for path, leaf in masters.items()}
    # Counters of the optimizer are scalars: replicate them over the mesh.
    one = next(iter(shardings.values()))
    everywhere = NamedSharding(one.mesh, PartitionSpec()) if isinstance(one, NamedSharding) else one
    opt_state = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, masters),
        shardings,
        transform_non_params=lambda _: everywhere,
    )
    return TuneState(shardings, opt_state)


class CompiledStep(NamedTuple):
    """A step, compiled for arrays of certain shapes and shardings.

    Attributes:
        call: (state, frozen, batch, rate, teacher_params) → (state, metrics); donates the state.
            A `jax.stages.Compiled`, which has a memory analysis.
        flops: FLOPs of one device; None if the backend does not count them.
    """

    call: Any
    flops: float | None


def compile_step(
    step: TuneStep,
    state: TuneState,
    frozen: Flat,
    batch: PackedBatch,
    rate: Any,
    teacher: Any = None,
) -> CompiledStep:
    """Compiles a step ahead of its first call.

    Args:
        state, frozen, batch, rate, teacher: arrays, or shapes with shardings. The new state gets
            the shardings of the old one.
    """
    leaves, tree = jax.tree.flatten(state_shardings(step.optimizer, state.params))
    run = _jitted(step, tuple(leaves), tree)
    compiled = run.lower(state, frozen, batch, rate, teacher).compile()
    cost = compiled.cost_analysis() or {}
    return CompiledStep(compiled, cost.get("flops"))


@functools.lru_cache(maxsize=16)
def _jitted(step: TuneStep, shardings: tuple[Any, ...], tree: Any) -> Any:
    """The jitted step. Runs with equal settings in one process share its programs."""
    new_state = jax.tree.unflatten(tree, shardings)
    return jax.jit(step, donate_argnums=0, out_shardings=(new_state, None))


@functools.cache
def adamw(b1: float, b2: float, weight_decay: float, clip: float) -> optax.GradientTransformation:
    """Clipping, then AdamW (arXiv 1711.05101) without the factor of the learning rate.

    Equal settings give the same object, so that steps with it are equal.

    Args:
        clip: largest global norm of the gradient.
    """
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.scale_by_adam(b1=b1, b2=b2),
        optax.add_decayed_weights(weight_decay),
    )


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Learning rate of a step: linear warm-up over `warmup` · `steps`, then a cosine to zero.

    Args:
        step: number of steps taken before this one.
    """
    first = max(1, round(warmup * steps))
    if step < first:
        return peak * (step + 1) / first
    return peak * 0.5 * (1 + math.cos(math.pi * (step - first) / max(1, steps - first)))
