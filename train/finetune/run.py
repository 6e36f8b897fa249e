"""A fine-tuning run; killed, it goes on where it was, to the bit."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import kvjax
from kvjax.hf import open_params, read_model
from kvjax.nn import Transformer
from kvjax.sharding import batch_sharding, make_mesh, param_shapes, parse_mesh
from train.data import count_batches, make_loader
from train.finetune import log
from train.finetune.checkpoints import Checkpoints
from train.finetune.config import TuneConfig
from train.finetune.labels import Flat, split, trainable_paths
from train.finetune.step import TuneState, TuneStep, adamw, compile_step, learning_rate

# Settings that a run may be continued with.
FREE = frozenset({"checkpoint_every", "log_every", "keep", "merge", "tensorboard", "mesh"})


@dataclass
class Tuning:
    """What a run works with, loaded once.

    Attributes:
        step: model, optimizer and settings of a step.
        frozen: flat parameters that don't train, in the compute dtype.
        teacher: parameters of the original model, if it is distilled from.
        mesh: None for one device.
    """

    step: TuneStep
    frozen: Flat
    teacher: Any
    mesh: Mesh | None

    def device_batch(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """A host's rows of a batch, where they are computed with."""
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, batch)
        sharding = batch_sharding(self.mesh)
        return {
            name: jax.make_array_from_process_local_data(sharding, rows)
            for name, rows in batch.items()
        }


def load(config: TuneConfig) -> tuple[Tuning, TuneState]:
    """Model, optimizer and parameters of a run, and its first state.

    Raises:
        ValueError: no such model, patterns that match nothing, a mesh that does not fit.
    """
    mesh = None if config.mesh is None else make_mesh(parse_mesh(config.mesh))
    if mesh is not None:
        ways = mesh.shape["data"] * mesh.shape["fsdp"]
        if (config.batch_size // config.accumulate) % ways:
            raise ValueError(
                f"got {config.batch_size // config.accumulate} rows at a time and data · fsdp = "
                f"{ways}, expected a multiple"
            )
    model = read_model(config.model)
    trainable, frozen = read_split(config, model, mesh)
    teacher, teacher_params = None, None
    if config.teacher is not None:
        teacher, teacher_params = kvjax.load(config.teacher, config.dtype, mesh)
        if teacher.config.vocab_size != model.config.vocab_size:
            raise ValueError(
                f"teacher {config.teacher} has {teacher.config.vocab_size} tokens, expected the "
                f"model's {model.config.vocab_size}"
            )
    step = TuneStep(
        model=model,
        optimizer=adamw(config.b1, config.b2, config.weight_decay, config.clip),
        dtype=config.dtype,
        accumulate=config.accumulate,
        remat=config.remat,
        place=None if mesh is None else batch_sharding(mesh),
        teacher=teacher,
        distill=config.distill,
    )
    return Tuning(step, frozen, teacher_params, mesh), step.init(trainable)


def read_split(config: TuneConfig, model: Transformer, mesh: Mesh | None) -> tuple[Flat, Flat]:
    """What trains in fp32 and the rest in the compute dtype; one layer is read at a time."""
    paths = trainable_paths(model, param_shapes(model), config.train)
    parts = open_params(config.model, "float32", mesh)
    trainable: Flat = {}
    frozen: Flat = {}
    for name in parts:
        own, rest = split({name: parts[name]}, paths)
        trainable |= own
        frozen |= {path: leaf.astype(config.dtype) for path, leaf in rest.items()}
    return trainable, frozen


def finetune(config: TuneConfig, out: Path, stop_after: int | None = None) -> dict[str, Any]:
    """Runs, or continues, the run in the folder `out`.

    Writes config.json, metrics.jsonl, loss.png, checkpoints/ and, if asked for, model/.

    Args:
        stop_after: stop before the end, after this many steps in all.

    Returns:
        Steps, last loss, parameters that train, tokens and learned tokens seen, seconds.

    Raises:
        ValueError: bad settings or data; another run's folder; a loss that is no number, whose
            step it names; a checkpoint that could not be written.
    """
    check_folder(config, out)
    tokenizer = kvjax.load_tokenizer(config.tokenizer or config.model)
    tuning, state = load(config)
    steps, data = plan(config, tokenizer)
    batches = iter(make_loader(data, tokenizer, jax.process_index(), jax.process_count()))
    checkpoints = Checkpoints(out, config.keep)
    at = Position()
    if checkpoints.steps():
        number, state, saved = checkpoints.load_newest(state)
        at = Position(number, *(saved[name] for name in ("tokens", "learned")))
        batches.set_state(saved["iterator"])
    log.truncate(out / "metrics.jsonl", at.step)
    loop = Loop(config, out, tuning, steps, checkpoints, batches)
    started, last = time.monotonic(), steps if stop_after is None else min(steps, stop_after)
    state, at = loop.run(state, at, last)
    checkpoints.close()
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
        from train.finetune.merge import write_merged

        report["model"] = str(write_merged(config, tuning, state, out / "model"))
    return report


def plan(config: TuneConfig, tokenizer: Any) -> tuple[int, Any]:
    """Steps of the run, and data that last for them."""
    data = config.data_config
    if config.steps is None:
        return count_batches(data, tokenizer, jax.process_count()), data
    once = count_batches(dataclasses.replace(data, epochs=1), tokenizer, jax.process_count())
    # One more: packing may leave a little less of each epoch.
    epochs = math.ceil(config.steps / once) + 1
    return config.steps, dataclasses.replace(data, epochs=epochs)


def check_folder(config: TuneConfig, out: Path) -> None:
    """Writes the settings into a new folder; compares them with those of an old one.

    Raises:
        ValueError: the folder holds a run with other settings; names them.
    """
    path, mine = out / "config.json", json.loads(json.dumps(dataclasses.asdict(config)))
    if path.exists():
        theirs = json.loads(path.read_text())
        different = [
            f"{name}: {theirs.get(name)!r} there, {mine[name]!r} now"
            for name in mine
            if name not in FREE and theirs.get(name) != mine[name]
        ]
        if different:
            raise ValueError(f"{out} holds a run with other settings ({'; '.join(different)})")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(mine, indent=1) + "\n")


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
            self.checkpoints.wait()
            kept = self.checkpoints.steps()
            raise ValueError(
                f"step {at.step + 1}: loss {values['loss']}, gradient norm {values['grad_norm']}, "
                "expected finite numbers; stopped, the last good checkpoint is of step "
                f"{kept[-1] if kept else 0}"
            )
        learned = at.learned + int(values["learned"])
        return Position(at.step + 1, at.tokens + int(values["tokens"]), learned)

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
        if jax.process_index() == 0:
            log.append(self.out / "metrics.jsonl", line)
        return line

    def save(self, at: Position, state: TuneState) -> None:
        """Starts a checkpoint of this position, unless it is there."""
        if at.step not in self.checkpoints.steps():
            where = {"iterator": self.batches.get_state(), "tokens": at.tokens}
            self.checkpoints.save(at.step, state, {**where, "learned": at.learned})


def progress_bar() -> Progress:
    """Steps taken of all, the loss, the time that remains; on one process only."""
    columns = Progress.get_default_columns()[:2]
    return Progress(
        *columns,
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
        disable=jax.process_index() != 0,
    )
