"""Layerwise distillation: a few gradient steps on the attention of one layer at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from kvjax.checks import COUNT, POSITIVE, SEED, SIZE, check_finite, check_params, check_ranges
from kvjax.nn import Transformer
from kvjax.nn.checks import check_fits
from kvjax.nn.transformer import Block, attention_output, block_kind, embed
from kvjax.transmla.calibration import Stats
from kvjax.transmla.sizes import checked_stats
from kvjax.transmla.streams import output_target, replay

RANGES = {"steps": SIZE, "batch_size": COUNT, "learning_rate": POSITIVE, "seed": SEED}


def distill(
    model: Transformer,
    params: Mapping[str, Any],
    converted_model: Transformer,
    converted_params: Mapping[str, Any],
    stats: Stats,
    *,
    steps: int = 300,
    batch_size: int = 8,
    learning_rate: float = 3e-3,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> dict[str, Any]:
    """Trains each converted attention to the output of the original, on the calibration text.

    Layers are trained in order, each on the output of the trained ones. The target of a layer is
    that of the least-squares refits (`streams.output_target`). The loss is the mean squared error
    divided by the mean square of the target; Adam with a cosine schedule and fp32 master weights.

    Examples:
        >>> stats = kvjax.transmla.calibrate(model, params, batches)
        >>> sizes = {"kv_rank": 12, "rope_dim": 4, "recipe": kvjax.transmla.published(fold=2)}
        >>> small, weights = kvjax.transmla.to_decoupled(model, params, stats, **sizes)
        >>> weights = kvjax.transmla.distill(model, params, small, weights, stats, steps=2)

    Args:
        model, params: the original.
        converted_model, converted_params: from `to_decoupled`.
        stats: calibration whose tokens are the text.
        steps, batch_size, learning_rate: for each layer; sequences are drawn with replacement.
        seed: of the draws.
        progress: called after each layer with its index and last relative error.

    Returns:
        The trained parameters of the converted model, in their dtypes.

    Raises:
        ValueError: a number out of its range, weights or moments that hold NaN, stats of another
            model, or a layer whose training diverges.
    """
    given = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate}
    check_ranges(given | {"seed": seed}, RANGES)
    check_fits(model, params)
    check_fits(converted_model, converted_params)
    stats = checked_stats(model, stats)
    check_params(params)
    check_params(converted_params)
    original = converted = embed(model.config, params, stats.tokens)
    new, rng = dict(converted_params), np.random.default_rng(seed)
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    for index, layer in enumerate(model.config.layers):
        name, after = f"layers_{index}", converted_model.config.layers[index]
        kind = block_kind(model.config, after)
        target = output_target(model.config, layer, params[name], original, converted)
        dtypes = jax.tree.map(lambda leaf: leaf.dtype, new[name]["attn"])
        # A step donates its masters, so they must be copies of the parameters of the caller.
        masters = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), new[name]["attn"])
        state, error = optimizer.init(masters), 0.0
        for _ in range(steps):
            rows = rng.integers(0, len(stats.tokens), batch_size)
            masters, state, error = _step(
                kind.block, optimizer, masters, state, new[name], kind.pairs,
                converted[rows], target[rows],
            )  # fmt: skip
        check_finite(masters, f"{name}/attn/", f" after {steps} steps of distillation")
        trained = jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), masters, dtypes)
        new[name] = {**new[name], "attn": trained}
        original = replay(model.config, layer, params[name], original)
        converted = replay(model.config, after, new[name], converted)
        if progress is not None:
            progress(index, float(error))
    return new


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def _step(
    block: Block,
    optimizer: optax.GradientTransformation,
    masters: dict[str, Any],
    state: Any,
    params: dict[str, Any],
    pairs: Int[Array, " half"] | None,
    x: Float[Array, "B T D"],
    target: Float[Array, "B T D"],
) -> tuple[dict[str, Any], Any, jax.Array]:
    def error(attn: dict[str, Any]) -> jax.Array:
        attn = jax.tree.map(lambda new, old: new.astype(old.dtype), attn, params["attn"])
        out = attention_output(block, {**params, "attn": attn}, pairs, x)
        missing = (out - target).astype(jnp.float32)
        return jnp.mean(missing**2) / jnp.mean(target.astype(jnp.float32) ** 2)

    value, gradient = jax.value_and_grad(error)(masters)
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
        updates, state = optimizer.update(gradient, state)
    stepped: Any = optax.apply_updates(masters, updates)
    return stepped, state, value
