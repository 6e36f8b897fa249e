"""Steps until the end of a run, with their log and checkpoints."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kvjax import processes
from kvjax.checks import first_not_finite
from train import log
from train.finetune.checkpoints import Checkpoints
from train.finetune.config import TuneConfig
from train.finetune.setup import Tuning
from train.finetune.step import TuneState, compile_step, learning_rate


@dataclass(frozen=True)
class Position:
    """Where a run stands: steps taken, tokens and learned targets seen."""

    step: int = 0
    tokens: int = 0
    learned: int = 0


@dataclass
class Loop:
    """Steps until the end, with their log and checkpoints."""

    config: TuneConfig
    out: Path
    tuning: Tuning
    steps: int
    checkpoints: Checkpoints
    batches: Any
    """An iterator of batches with get_state."""

    def run(self, state: TuneState, at: Position, last: int) -> tuple[TuneState, Position]:
        """The state after step `last`."""
        config, compiled = self.config, None
        logged, since, waiting = at, time.monotonic(), None
        with progress_bar() as bar:
            task = bar.add_task("training", total=self.steps, completed=at.step, loss="")
            while at.step < last:
                batch = self.tuning.device_batch(next(self.batches))
                number = at.step + (waiting is not None)
                rate = learning_rate(number, self.steps, config.learning_rate, config.warmup)
                arguments = state, self.tuning.frozen, batch, jnp.float32(rate), self.tuning.teacher
                if compiled is None:
                    compiled = compile_step(self.tuning.step, *arguments)
                    since = time.monotonic()
                state, metrics = compiled.call(*arguments)
                # While the device takes this step, the one before is looked at.
                at = at if waiting is None else self.moved(at, waiting)
                number, waiting = number + 1, metrics
                due = number % config.log_every == 0, number % config.checkpoint_every == 0
                if not any(due) and number < last:
                    continue
                at, waiting = self.moved(at, metrics), None
                if due[0] or number == self.steps:
                    line = self.line(logged, at, metrics, time.monotonic() - since, compiled.flops)
                    logged, since = at, time.monotonic()
                    bar.update(task, completed=at.step, loss=f"loss {line['loss']:.4f}")
                if due[1] or number == last:
                    self.save(at, state)
        return state, at

    def moved(self, at: Position, metrics: Any) -> Position:
        """The position after a step whose loss is a number.

        Raises:
            ValueError: it is none; the checkpoints are those of before.
        """
        values = {name: float(value) for name, value in metrics.items()}
        if not all(map(math.isfinite, values.values())):
            raise self.stopped(
                at.step + 1, f"loss {values['loss']}, gradient norm {values['grad_norm']}"
            )
        learned = at.learned + int(values["learned"])
        return Position(at.step + 1, at.tokens + int(values["tokens"]), learned)

    def stopped(self, step: int, got: str) -> ValueError:
        """The error of a run whose numbers are none from this step on."""
        self.checkpoints.wait()
        kept = self.checkpoints.steps()
        last = f"the last good checkpoint is of step {kept[-1]}" if kept else "no checkpoint yet"
        return ValueError(f"step {step}: {got}, expected finite numbers; stopped, {last}")

    def line(
        self, before: Position, at: Position, metrics: Any, seconds: float, flops: float | None
    ) -> dict[str, Any]:
        """Writes one line of the log: the last step's loss, and the speed since the line before."""
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
            log.append(self.out / "metrics.jsonl", line)
            if self.config.tensorboard:
                log.tensorboard(self.out, line)
        return line

    def save(self, at: Position, state: TuneState) -> None:
        """Starts a checkpoint of this position, unless it is there.

        The loss of a step is of the parameters before it: those after it are checked here.

        Raises:
            ValueError: they are not finite; nothing is written.
        """
        if at.step not in self.checkpoints.steps():
            name = first_not_finite(state.params) or first_not_finite(state.opt_state)
            if name is not None:
                raise self.stopped(at.step, f"NaN or infinite values in {name}")
            iterators = of_all_processes(self.batches.get_state())
            where = {"iterators": iterators, "tokens": at.tokens, "learned": at.learned}
            self.checkpoints.save(at.step, state, where)


def of_all_processes(state: dict[str, Any]) -> list[dict[str, Any]]:
    """The states of all processes' iterators, nested dicts of whole numbers, in their order."""
    leaves, structure = jax.tree.flatten(state)
    if jax.process_count() == 1:
        return [state]
    rows = multihost_utils.process_allgather(np.asarray(leaves, np.int32))
    return [structure.unflatten(row.tolist()) for row in rows]


def progress_bar() -> Progress:
    """Steps taken of all, the loss, the time that remains; on one process only."""
    columns = Progress.get_default_columns()[:2]
    return Progress(
        *columns,
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
        disable=not processes.is_writer(),
    )
