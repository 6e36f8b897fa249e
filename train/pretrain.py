"""Pretraining by stages: seeded, logged, resumable to the bit."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kvjax.finite import first_not_finite
from kvjax.nn import Transformer
from kvjax.ranges import SIZE, check_ranges, optional
from kvjax.tasks.words import WordVocabulary
from train import checkpoints, log
from train.checkpoints import Progress
from train.episodes import KINDS, Batch, make_batch
from train.recipe import Recipe, Stage, model_config
from train.step import TrainState, create_state, make_optimizer, train_step


@dataclass(frozen=True)
class Run:
    """What does not change during a run."""

    recipe: Recipe
    vocab: WordVocabulary
    model: Transformer
    optimizer: optax.GradientTransformation


def create_run(recipe: Recipe) -> Run:
    """Model and optimizer of a recipe."""
    vocab = WordVocabulary()
    config = model_config(recipe.model, vocab.size, vocab.bos_id, vocab.eos_id)
    optimizer = make_optimizer(recipe.weight_decay, recipe.b2, recipe.clip)
    return Run(recipe, vocab, Transformer(config), optimizer)


def initial_state(run: Run) -> TrainState:
    """Random parameters, from the recipe's seed."""
    init = jax.jit(run.model.init)
    params = dict(init(jax.random.key(run.recipe.seed), jnp.zeros((1, 1), jnp.int32))["params"])
    embedding = params["embedding"]
    params["embedding"] = embedding * (run.recipe.embedding_scale / jnp.std(embedding))
    return create_state(params, run.optimizer, len(KINDS))


def learning_rate(recipe: Recipe, progress: Progress) -> float:
    """Linear warm-up over the run; constant, or falling to zero, within a stage."""
    stage = recipe.stages[progress.stage]
    rate = recipe.learning_rate * stage.learning_rate_scale
    rate *= min(1.0, (progress.step + 1) / recipe.warmup_steps)
    return rate * (1 - progress.stage_step / stage.max_steps if stage.decay else 1.0)


def draw_batch(run: Run, progress: Progress) -> Batch:
    """The batch of a step: a function of the seed, the step and the stage, and of nothing else.

    Questions of a rehearsed stage are not counted, so that the gate sees the stage's own.
    """
    recipe = run.recipe
    rng = np.random.default_rng([recipe.seed, progress.step])
    stage = recipe.stages[progress.stage]
    rehearse = progress.stage > 0 and rng.random() < recipe.rehearsal
    if rehearse:
        earlier = progress.stage - 1 if stage.rehearses is None else stage.rehearses
        stage = recipe.stages[earlier]
    batch = make_batch(rng, run.vocab, stage.episodes, stage.batch_size)
    if rehearse:
        batch.kind[:] = -1
    return batch


def advance(run: Run, state: TrainState, progress: Progress) -> tuple[TrainState, Progress]:
    """Takes one step."""
    batch = draw_batch(run, progress)
    state = train_step(
        run.model,
        run.optimizer,
        run.recipe.text_weight,
        state,
        jnp.float32(learning_rate(run.recipe, progress)),
        batch.tokens,
        batch.question,
        batch.kind,
    )
    return state, dataclasses.replace(
        progress,
        step=progress.step + 1,
        stage_step=progress.stage_step + 1,
        tokens=progress.tokens + batch.question.size,
    )


def accuracies(state: TrainState) -> dict[str, float]:
    """Share of whole answers right since the last report, for each kind that was asked."""
    correct, asked = np.asarray(state.correct), np.asarray(state.asked)
    return {kind: float(correct[i] / asked[i]) for i, kind in enumerate(KINDS) if asked[i]}


def stage_done(stage: Stage, progress: Progress, accuracy: dict[str, float]) -> bool:
    """Whether every kind of question passes the gate, or the stage has had its steps."""
    passed = set(accuracy) == set(stage.episodes.kinds) and min(accuracy.values()) >= stage.gate
    return passed or progress.stage_step >= stage.max_steps


def pretrain(recipe: Recipe, out: Path, max_steps: int | None = None) -> TrainState:
    """Runs a recipe to its end, from the newest checkpoint under `out` if there is one.

    Writes `out`/metrics.jsonl and `out`/checkpoints. A run that was stopped and resumed gives
    the same parameters, bit for bit, as one that was not.

    Args:
        max_steps: stop after this many steps in all; the last checkpoint may be older.

    Raises:
        ValueError: a loss or parameters that are no numbers any more, or a checkpoint of such.
    """
    check_ranges({"max_steps": max_steps}, {"max_steps": optional(SIZE)})
    last = math.inf if max_steps is None else max_steps
    run = create_run(recipe)
    state, progress = initial_state(run), Progress()
    if checkpoints.steps(out):
        state, progress = checkpoints.load_newest(out, state)
    metrics = out / "metrics.jsonl"
    log.truncate(metrics, progress.step)
    started = time.monotonic()
    while progress.stage < len(recipe.stages) and progress.step < last:
        state, progress = advance(run, state, progress)
        if progress.step % recipe.report_every:
            continue
        check_state(state, progress, out)
        accuracy = accuracies(state)
        log_line(metrics, recipe, state, progress, accuracy, time.monotonic() - started)
        started = time.monotonic()
        state = state.reset()
        if stage_done(recipe.stages[progress.stage], progress, accuracy):
            progress = dataclasses.replace(progress, stage=progress.stage + 1, stage_step=0)
        checkpoints.save(out, state, progress)
    check_state(state, progress, out)
    return state


def check_state(state: TrainState, progress: Progress, out: Path) -> None:
    """Raises ValueError where the loss or a parameter is no number; nothing is written then."""
    name = first_not_finite(state.loss, "loss") or first_not_finite(state)
    if name is not None:
        kept = checkpoints.steps(out)
        last = f"the last good checkpoint is of step {kept[-1]}" if kept else "no checkpoint yet"
        raise ValueError(
            f"step {progress.step}: NaN or infinite values in {name}, expected finite numbers; "
            f"stopped, {last}"
        )


def log_line(
    path: Path,
    recipe: Recipe,
    state: TrainState,
    progress: Progress,
    accuracy: dict[str, float],
    seconds: float,
) -> None:
    """Appends one JSON line and prints it."""
    line = {
        "step": progress.step,
        "stage": progress.stage,
        "tokens": progress.tokens,
        "loss": round(float(state.loss) / recipe.report_every, 4),
        "accuracy": {kind: round(value, 4) for kind, value in accuracy.items()},
        "learning_rate": learning_rate(recipe, progress),
        "seconds": round(seconds, 1),
    }
    log.append(path, line)
    print(json.dumps(line), flush=True)
