"""A fine-tuning run: its folder, its loop over steps, its log and its checkpoints.

A run that was killed and resumed ends with the same parameters, bit for bit, as one that was not:
a checkpoint holds the trainable parameters, the optimizer's state and the state of the data.
"""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

import kvjax
from kvjax import processes, runs
from kvjax.checks import COUNT, check_finite, check_ranges, first_not_finite, optional
from kvjax.endings import say_finished
from kvjax.extras import import_extra, pyplot
from kvjax.hf import layout_of
from kvjax.hf.save import is_saved, saving, write_model
from kvjax.hf.source import copy_companions
from kvjax.identity import part_checksum
from kvjax.paths import local_path
from kvjax.progress import progress_bar
from train import log
from train.checkpoints import Checkpoints
from train.data import check_documents, count_batches, epochs_for, make_loader
from train.finetune.config import TuneConfig, check_paths, with_dtype
from train.finetune.setup import Tuning, load
from train.finetune.step import TuneState, compile_step, learning_rate, merged

FREE = frozenset({"checkpoint_every", "log_every", "keep", "merge", "tensorboard", "mesh"})
"""Settings that may change when a run is resumed."""
ADVICE = "give another folder"
MODEL = "model"
"""The folder inside a run's folder for the merged model."""


def finetune(config: TuneConfig, out: Path, stop_after: int | None = None) -> dict[str, Any]:
    """Starts a run in the folder `out`, or resumes the run that the folder holds.

    Writes config.json, weights.json (a checksum of the first weights), metrics.jsonl, loss.png,
    checkpoints/ and, with `config.merge`, model/.

    Args:
        stop_after: stop before the end, after this many steps in all.

    Returns:
        Steps, last loss, number of parameters that train, of tokens and of learned tokens, seconds.

    Raises:
        ValueError: bad settings or data; a URL; another run's folder; a model or a checkpoint that
            holds NaN; a step whose loss or parameters are not finite; a checkpoint that could not
            be written; a package of the extra `train` that is not installed.
    """
    # Refuse bad settings and another run's folder before anything is loaded.
    import_extra("grain", "train")
    pyplot()
    check_ranges({"stop_after": stop_after}, {"stop_after": optional(COUNT)})
    check_paths(config)
    config = with_dtype(config)
    out = local_path(out, "out")
    processes.on_writer(lambda: check_folder(config, out))
    tokenizer = kvjax.load_tokenizer(config.tokenizer or config.model)
    tuning, state = load(config)
    # Checkpoints don't hold frozen parameters: they must be the ones that the run began with.
    weights = part_checksum([state.params, tuning.frozen, tuning.teacher])
    steps, data = steps_and_data(config, tokenizer)
    shape = tuning.step.model.config
    check_documents(data, tokenizer, shape.vocab_size, shape.context_length)
    batches = iter(make_loader(data, tokenizer, jax.process_index(), jax.process_count()))
    processes.on_writer(lambda: claim_folder(config, weights, out))
    # Resume from the newest checkpoint; log lines of later steps are written again.
    checkpoints = Checkpoints(out, config.keep)
    at = Position()
    if checkpoints.steps():
        number, state, saved = checkpoints.load_newest(state)
        checkpoints.check_finite(number, state)
        at = Position(number, *(saved[name] for name in ("tokens", "learned")))
        check_processes(len(saved["iterators"]), out)
        batches.set_state(saved["iterators"][jax.process_index()])
    if processes.is_writer():
        log.truncate(out / "metrics.jsonl", at.step)
    # Train, and report.
    if at.step == steps and (not config.merge or is_saved(out / MODEL)):
        say_finished(out)
    loop = Loop(config, out, tuning, steps, checkpoints, batches)
    started, last = time.monotonic(), steps if stop_after is None else min(steps, stop_after)
    state, at = loop.run(state, at, last)
    checkpoints.close()
    if processes.is_writer():
        log.plot(out / "metrics.jsonl", out / "loss.png")
    lines = log.read(out / "metrics.jsonl")
    report = {
        "steps": at.step,
        "of": steps,
        "loss": lines[-1]["loss"] if lines else None,
        "trainable": sum(leaf.size for leaf in state.params.values()),
        "frozen": sum(leaf.size for leaf in tuning.frozen.values()),
        "tokens": at.tokens,
        "learned_tokens": at.learned,
        "seconds": round(time.monotonic() - started, 1),
    }
    if config.merge and at.step == steps:
        report["model"] = str(write_merged(config, tuning, state, out / MODEL))
    return report


def steps_and_data(config: TuneConfig, tokenizer: Any) -> tuple[int, Any]:
    """Number of steps of the run, and data with enough epochs for them."""
    data = config.data_config
    if config.steps is None:
        return count_batches(data, tokenizer, jax.process_count()), data
    return config.steps, epochs_for(data, tokenizer, config.steps, jax.process_count())


def check_folder(config: TuneConfig, out: Path) -> None:
    """Compares the settings with those of the run to resume, if there is one.

    Raises:
        ValueError: the folder holds a run with other settings; names them.
    """
    runs.check_claim(out / "config.json", dataclasses.asdict(config), _other(out), ADVICE, FREE)


def claim_folder(config: TuneConfig, weights: str, out: Path) -> None:
    """Writes config.json and weights.json, or compares them with those of the run to resume.

    Args:
        weights: checksum of the first weights of the model and its teacher.

    Raises:
        ValueError: the folder holds a run with other settings, or with other first weights.
    """
    holder = f"{out} holds a run that began with other weights of its model or teacher"
    runs.claim(out / "weights.json", {"weights": weights}, holder, ADVICE)
    runs.claim(out / "config.json", dataclasses.asdict(config), _other(out), ADVICE, FREE)


def _other(out: Path) -> str:
    return f"{out} holds a run with other settings"


def check_processes(saved: int, out: Path) -> None:
    """Raises ValueError where the run was started with another number of processes.

    Args:
        saved: number of processes in the checkpoint; each has read a share of the data.
    """
    if saved != jax.process_count():
        raise ValueError(
            f"{out} holds a run of {saved} processes, got {jax.process_count()}: each has its "
            "share of the data; start the same number"
        )


@dataclass(frozen=True)
class Position:
    """Progress of a run: numbers of steps taken, of tokens and of learned targets seen."""

    step: int = 0
    tokens: int = 0
    learned: int = 0


@dataclass
class Loop:
    """The loop over steps, with log and checkpoints.

    Attributes:
        out: the run's folder.
        steps: number of steps of the whole run.
        batches: iterator over batches, with `get_state`.
    """

    config: TuneConfig
    out: Path
    tuning: Tuning
    steps: int
    checkpoints: Checkpoints
    batches: Any

    def run(self, state: TuneState, at: Position, last: int) -> tuple[TuneState, Position]:
        """Takes steps until `last` have been taken in all.

        A step is checked while the device computes the next one, unless a log line or a checkpoint
        is due: `waiting` holds the metrics of the step that is not checked yet.
        """
        config, compiled = self.config, None
        logged, since, waiting = at, time.monotonic(), None
        with progress_bar() as bar:
            task = bar.add_task("training", total=self.steps, completed=at.step, items="")
            while at.step < last:
                batch = self.tuning.device_batch(next(self.batches))
                number = at.step + (waiting is not None)
                rate = learning_rate(number, self.steps, config.learning_rate, config.warmup)
                arguments = state, self.tuning.frozen, batch, jnp.float32(rate), self.tuning.teacher
                if compiled is None:  # compiling does not count as training time
                    compiled = compile_step(self.tuning.step, *arguments)
                    since = time.monotonic()
                state, metrics = compiled.call(*arguments)
                # The device computes this step meanwhile.
                at = at if waiting is None else self.checked(at, waiting)
                number, waiting = number + 1, metrics
                # Wait for the step only if it is logged, saved or the last one.
                due = number % config.log_every == 0, number % config.checkpoint_every == 0
                if not any(due) and number < last:
                    continue
                at, waiting = self.checked(at, metrics), None
                if due[0] or number == self.steps:
                    line = self.line(logged, at, metrics, time.monotonic() - since, compiled.flops)
                    logged, since = at, time.monotonic()
                    bar.update(
                        task,
                        completed=at.step,
                        items=f"step {at.step} of {self.steps}, loss {line['loss']:.4f}",
                    )
                if due[1] or number == last:
                    self.save(at, state)
        return state, at

    def checked(self, at: Position, metrics: Any) -> Position:
        """The position after a step, once its metrics are known to be finite.

        Raises:
            ValueError: a metric is not finite; no checkpoint of this step is written.
        """
        values = {name: float(value) for name, value in metrics.items()}
        if not all(map(math.isfinite, values.values())):
            raise self.stopped(
                at.step + 1, f"loss {values['loss']}, gradient norm {values['grad_norm']}"
            )
        learned = at.learned + int(values["learned"])
        return Position(at.step + 1, at.tokens + int(values["tokens"]), learned)

    def stopped(self, step: int, got: str) -> ValueError:
        """The error of a run with numbers that are not finite from this step on."""
        self.checkpoints.wait()
        kept = self.checkpoints.steps()
        last = f"the last good checkpoint is of step {kept[-1]}" if kept else "no checkpoint yet"
        return ValueError(f"step {step}: {got}, expected finite numbers; stopped, {last}")

    def line(
        self, before: Position, at: Position, metrics: Any, seconds: float, flops: float | None
    ) -> dict[str, Any]:
        """Writes one line of the log: metrics of the last step, speed since the previous line.

        Args:
            before: position of the previous line.
            seconds: since the previous line.
            flops: of a step on one device; None if unknown.
        """
        device = jax.devices()[0].device_kind
        named = ("loss", "accuracy", "divergence", "grad_norm")
        config = self.config
        line = {
            "step": at.step,
            **{name: round(float(metrics[name]), 6) for name in named},
            "learning_rate": learning_rate(
                at.step - 1, self.steps, config.learning_rate, config.warmup
            ),
            "tokens": at.tokens,
            "learned_tokens": at.learned,
            "tokens_per_second": round((at.tokens - before.tokens) / seconds, 1),
            "mfu": flops and log.utilisation(flops * (at.step - before.step), seconds, device),
            "seconds": round(seconds, 2),
        }
        if processes.is_writer():
            runs.append_lines(self.out / "metrics.jsonl", [line])
            if self.config.tensorboard:
                log.tensorboard(self.out, line)
        return line

    def save(self, at: Position, state: TuneState) -> None:
        """Starts to write a checkpoint of this position, unless it exists.

        Raises:
            ValueError: a parameter or a moment is not finite; nothing is written.
        """
        # The loss of a step comes from the parameters before its update: check the new ones here.
        if at.step not in self.checkpoints.steps():
            name = first_not_finite(state.params) or first_not_finite(state.opt_state)
            if name is not None:
                raise self.stopped(at.step, f"NaN or infinite values in {name}")
            iterators = of_all_processes(self.batches.get_state())
            where = {"iterators": iterators, "tokens": at.tokens, "learned": at.learned}
            self.checkpoints.save(at.step, state, where)


def of_all_processes(state: dict[str, Any]) -> list[dict[str, Any]]:
    """States of the iterators of all processes, in the order of the processes.

    Args:
        state: of this process: nested dicts of integers.
    """
    if jax.process_count() == 1:
        return [state]
    # Gather the integers as one array; the structure is the same on all processes.
    leaves, structure = jax.tree.flatten(state)
    rows = multihost_utils.process_allgather(np.asarray(leaves, np.int32))
    return [structure.unflatten(row.tolist()) for row in rows]


def write_merged(config: TuneConfig, tuning: Tuning, state: TuneState, out: Path) -> Path:
    """Writes the fine-tuned model with its tokenizer to a directory that `kvjax.load` reads.

    The layout is that of the run's model: Hugging Face's (also for a healed export) or the native.
    The directory is whole or absent. A model that is there is the one of an earlier call.

    Raises:
        ValueError: a parameter is not finite.
    """
    if processes.on_writer(lambda: is_saved(out)):
        return out
    model = tuning.step.model
    dtype = tuning.step.dtype
    params = merged(state, tuning.frozen, dtype)
    check_finite(params, reason=f" in {dtype}; no model is written")
    layout = "native" if layout_of(config.model) == "native" else "hf"
    with saving(params, out, layout) as part:
        write_model(model, params, part, layout)
        processes.on_writer(lambda: copy_companions(Path(model.config.source), part))
    return out
