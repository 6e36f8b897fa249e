"""Pretraining in stages: the run with its log and checkpoints, and one optimizer step.

A run that was stopped and resumed ends with the same parameters, bit for bit, as one that was not.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from kvjax.checks import SIZE, check_ranges, first_not_finite, optional
from kvjax.endings import say_finished
from kvjax.nn import Transformer
from kvjax.runs import append_lines, claim
from kvjax.tasks.words import WordVocabulary
from train import log
from train.checkpoints import Checkpoints, finished_steps
from train.pretrain.curriculum import Curriculum, Stage, model_config
from train.pretrain.episodes import KINDS, EpisodeBatch, make_batch

KEPT = 2
"""Number of checkpoints that a run keeps."""


@dataclass(frozen=True)
class Run:
    """Everything that stays the same during a run."""

    curriculum: Curriculum
    vocab: WordVocabulary
    model: Transformer
    optimizer: optax.GradientTransformation


@dataclass(frozen=True)
class Progress:
    """Progress of a run: steps taken in all, the stage, steps taken in the stage, tokens seen."""

    step: int = 0
    stage: int = 0
    stage_step: int = 0
    tokens: int = 0


def pretrain(curriculum: Curriculum, out: Path, max_steps: int | None = None) -> TrainState:
    """Trains through a curriculum, from the newest checkpoint under `out` if there is one.

    Writes `out`/config.json, `out`/metrics.jsonl and `out`/checkpoints.

    Args:
        max_steps: stop after this many steps in all; the newest checkpoint may be older.

    Raises:
        ValueError: a loss, parameters or a checkpoint with numbers that are not finite; or the
            folder holds a run of another curriculum.
    """
    check_ranges({"max_steps": max_steps}, {"max_steps": optional(SIZE)})
    last = math.inf if max_steps is None else max_steps
    run = create_run(curriculum)
    state, progress = initial_state(run), Progress()
    settings, holder = dataclasses.asdict(curriculum), f"{out} holds a run of another curriculum"
    claim(out / "config.json", settings, holder, "give another folder")
    if finished_steps(out):
        state, progress = load_newest(out, state)
    if progress.stage == len(curriculum.stages):
        say_finished(out)
    metrics = out / "metrics.jsonl"
    log.truncate(metrics, progress.step)
    started = time.monotonic()
    while progress.stage < len(curriculum.stages) and progress.step < last:
        state, progress = advance(run, state, progress)
        if progress.step % curriculum.report_every:
            continue
        # Every `report_every` steps: log, end the stage if its gate is passed, write a checkpoint.
        check_state(state, progress, out)
        accuracy = accuracies(state)
        log_line(metrics, curriculum, state, progress, accuracy, time.monotonic() - started)
        started = time.monotonic()
        state = state.reset()
        if stage_done(curriculum.stages[progress.stage], progress, accuracy):
            progress = dataclasses.replace(progress, stage=progress.stage + 1, stage_step=0)
        save(out, state, progress)
    check_state(state, progress, out)
    return state


def create_run(curriculum: Curriculum) -> Run:
    """Makes the model and the optimizer of a curriculum."""
    vocab = WordVocabulary()
    config = model_config(curriculum.model, vocab.size, vocab.bos_id, vocab.eos_id)
    optimizer = make_optimizer(curriculum.weight_decay, curriculum.b2, curriculum.clip)
    return Run(curriculum, vocab, Transformer(config), optimizer)


def initial_state(run: Run) -> TrainState:
    """The first state: random parameters from the curriculum's seed."""
    params = dict(_random_params(run.model, jax.random.key(run.curriculum.seed)))
    # Scale the embeddings to their standard deviation in the curriculum.
    embedding = params["embedding"]
    params["embedding"] = embedding * (run.curriculum.embedding_scale / jnp.std(embedding))
    return create_state(params, run.optimizer, len(KINDS))


@functools.partial(jax.jit, static_argnums=0)
def _random_params(model: Transformer, key: jax.Array) -> Any:
    return model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def advance(run: Run, state: TrainState, progress: Progress) -> tuple[TrainState, Progress]:
    """Takes one step and returns the new state and progress."""
    batch = draw_batch(run, progress)
    state = train_step(
        run.model,
        run.optimizer,
        run.curriculum.text_weight,
        state,
        jnp.float32(learning_rate(run.curriculum, progress)),
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


def draw_batch(run: Run, progress: Progress) -> EpisodeBatch:
    """Draws the batch of a step; it depends on the seed, the step and the stage only.

    Questions of a rehearsed stage get kind −1: the gate of the current stage does not count them.
    """
    curriculum = run.curriculum
    # A generator for each step: a resumed run draws the same batches without replaying the others.
    rng = np.random.default_rng([curriculum.seed, progress.step])
    stage = curriculum.stages[progress.stage]
    rehearse = progress.stage > 0 and rng.random() < curriculum.rehearsal
    if rehearse:
        earlier = progress.stage - 1 if stage.rehearses is None else stage.rehearses
        stage = curriculum.stages[earlier]
    batch = make_batch(rng, run.vocab, stage.episodes, stage.batch_size)
    if rehearse:
        batch.kind[:] = -1
    return batch


def learning_rate(curriculum: Curriculum, progress: Progress) -> float:
    """Rate of the next step: warm-up over the run, then constant or decaying within a stage."""
    stage = curriculum.stages[progress.stage]
    rate = curriculum.learning_rate * stage.learning_rate_scale
    rate *= min(1.0, (progress.step + 1) / curriculum.warmup_steps)
    return rate * (1 - progress.stage_step / stage.max_steps if stage.decay else 1.0)


def stage_done(stage: Stage, progress: Progress, accuracy: dict[str, float]) -> bool:
    """Whether every kind of question passes the gate, or the stage has taken its last step."""
    passed = set(accuracy) == set(stage.episodes.kinds) and min(accuracy.values()) >= stage.gate
    return passed or progress.stage_step >= stage.max_steps


def accuracies(state: TrainState) -> dict[str, float]:
    """Share of whole answers that were right since the last report, by kind of question."""
    correct, asked = np.asarray(state.correct), np.asarray(state.asked)
    return {kind: float(correct[i] / asked[i]) for i, kind in enumerate(KINDS) if asked[i]}


def check_state(state: TrainState, progress: Progress, out: Path) -> None:
    """Raises ValueError where the loss or a parameter is not finite; called before writing."""
    name = first_not_finite(state.loss, "loss") or first_not_finite(state)
    if name is not None:
        kept = finished_steps(out)
        last = f"the last good checkpoint is of step {kept[-1]}" if kept else "no checkpoint yet"
        raise ValueError(
            f"step {progress.step}: NaN or infinite values in {name}, expected finite numbers; "
            f"stopped, {last}"
        )


def log_line(
    path: Path,
    curriculum: Curriculum,
    state: TrainState,
    progress: Progress,
    accuracy: dict[str, float],
    seconds: float,
) -> None:
    """Adds one line to the log and prints it."""
    line = {
        "step": progress.step,
        "stage": progress.stage,
        "tokens": progress.tokens,
        "loss": round(float(state.loss) / curriculum.report_every, 4),
        "accuracy": {kind: round(value, 4) for kind, value in accuracy.items()},
        "learning_rate": learning_rate(curriculum, progress),
        "seconds": round(seconds, 1),
    }
    append_lines(path, [line])
    print(json.dumps(line), flush=True)


def save(out: Path, state: TrainState, progress: Progress) -> None:
    """Writes a checkpoint and deletes the ones that are no longer needed."""
    checkpoints = Checkpoints(out, KEPT)
    # Closing waits: the next step donates these buffers.
    content = {"state": state, "progress": dataclasses.asdict(progress)}
    checkpoints.save(progress.step, content, {})
    checkpoints.close()


def load_newest(out: Path, like: TrainState) -> tuple[TrainState, Progress]:
    """Loads the newest checkpoint of the run in `out`.

    Args:
        like: a state of the same shapes and dtypes.

    Raises:
        ValueError: no checkpoint, or the newest one holds NaN.
    """
    if not finished_steps(out):
        raise ValueError(f"{out} has no checkpoint")
    checkpoints = Checkpoints(out, KEPT)
    content = {"state": like, "progress": dataclasses.asdict(Progress())}
    step, loaded, _ = checkpoints.load_newest(content)
    checkpoints.check_finite(step, loaded["state"])
    checkpoints.close()
    progress = {name: int(value) for name, value in loaded["progress"].items()}
    return loaded["state"], Progress(**progress)


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes.

    Attributes:
        params, opt_state: parameters of the model, state of the optimizer.
        correct, asked: fp32 [kinds] numbers of answers that were right as a whole and of questions
            asked, since the last reset.
        loss: fp32 sum of the losses since the last reset.
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
    # Separate buffers: the step donates each of them.
    return {
        "correct": jnp.zeros((kinds,), jnp.float32),
        "asked": jnp.zeros((kinds,), jnp.float32),
        "loss": jnp.zeros((), jnp.float32),
    }


@functools.cache
def make_optimizer(weight_decay: float, b2: float, clip: float) -> optax.GradientTransformation:
    """AdamW without the factor of the learning rate; weights of norms are not trained.

    Equal settings give the same object, so that runs in one process share the compiled step.
    """

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
    """Numbers of answers that are right in every token, and of questions, by kind.

    Answers are teacher-forced: an answer counts if and only if greedy decoding would write it.

    Args:
        question, kind: see `episodes.EpisodeBatch`.
        kinds: number of kinds.
    """
    # Count the wrong tokens of each question. Tokens outside of answers have index −1, which wraps
    # to the last question: the mask adds 0 for them.
    wrong = (jnp.argmax(logits, axis=-1) != targets) & (question >= 0)
    rows = jnp.arange(kind.shape[0], dtype=jnp.int32)[:, None]
    errors = (
        jnp.zeros(kind.shape, jnp.int32)
        .at[rows, question]
        .add(wrong.astype(jnp.int32), mode="drop")
    )
    # An answer is right without a wrong token; kind −1 matches no kind and is not counted.
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
    """The state after one batch.

    Args:
        tokens, question, kind: see `episodes.EpisodeBatch`.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]

    def loss_and_logits(params):
        logits, _ = model.apply({"params": params}, inputs)
        return answer_loss(logits, targets, question, text_weight), logits

    (loss, logits), grads = jax.value_and_grad(loss_and_logits, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    # The rate is an argument, so that it can change without compiling the step again.
    updates = jax.tree.map(lambda u: -learning_rate * u, updates)
    correct, asked = count_answers(logits, targets, question, kind, state.correct.shape[0])
    return TrainState(
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
        correct=state.correct + correct,
        asked=state.asked + asked,
        loss=state.loss + loss,
    )
