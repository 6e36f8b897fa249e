"""A fine-tuning run; killed, it goes on where it was, to the bit."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import jax

import kvjax
from kvjax import processes
from kvjax.checks import COUNT, check_ranges, optional
from kvjax.hf.fields import read_json
from kvjax.identity import part_checksum
from kvjax.paths import local_path
from train import log
from train.data import check_documents, count_batches, make_loader
from train.finetune.checkpoints import Checkpoints
from train.finetune.config import TuneConfig, check_paths
from train.finetune.loop import Loop, Position
from train.finetune.merge import write_merged
from train.finetune.setup import load

# Settings that a run may be continued with.
FREE = frozenset({"checkpoint_every", "log_every", "keep", "merge", "tensorboard", "mesh"})


def finetune(config: TuneConfig, out: Path, stop_after: int | None = None) -> dict[str, Any]:
    """Runs, or continues, the run in the folder `out`.

    Writes config.json, weights.json (a checksum of what it began with), metrics.jsonl, loss.png,
    checkpoints/ and, if asked for, model/.

    Args:
        stop_after: stop before the end, after this many steps in all.

    Returns:
        Steps, last loss, parameters that train, tokens and learned tokens seen, seconds.

    Raises:
        ValueError: bad settings or data; a URL; another run's folder; a model or a checkpoint that
             holds NaN; a loss or parameters that are no numbers, whose step it names; a checkpoint
             that could not be written.
    """
    check_ranges({"stop_after": stop_after}, {"stop_after": optional(COUNT)})
    check_paths(config)
    out = local_path(out, "out")
    processes.on_writer(lambda: check_folder(config, out))
    tokenizer = kvjax.load_tokenizer(config.tokenizer or config.model)
    tuning, state = load(config)
    weights = part_checksum([state.params, tuning.frozen, tuning.teacher])
    processes.on_writer(lambda: check_weights(weights, out))
    steps, data = plan(config, tokenizer)
    shape = tuning.step.model.config
    check_documents(data, tokenizer, shape.vocab_size, shape.context_length)
    batches = iter(make_loader(data, tokenizer, jax.process_index(), jax.process_count()))
    checkpoints = Checkpoints(out, config.keep)
    at = Position()
    if checkpoints.steps():
        number, state, saved = checkpoints.load_newest(state)
        at = Position(number, *(saved[name] for name in ("tokens", "learned")))
        check_processes(len(saved["iterators"]), out)
        batches.set_state(saved["iterators"][jax.process_index()])
    if processes.is_writer():
        log.truncate(out / "metrics.jsonl", at.step)
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


def check_weights(weights: str, out: Path) -> None:
    """Notes what a new run starts from; compares it where the run goes on.

    Args:
        weights: checksum of the model's weights, and of its teacher's.

    Raises:
        ValueError: the run began with others, which its checkpoints do not hold in full.
    """
    path = out / "weights.json"
    held = read_json(path)[1].get("weights") if path.exists() else weights
    if held != weights:
        raise ValueError(
            f"{out} holds a run that began with weights {held}, model and teacher have {weights} "
            "now: give another folder"
        )
    path.write_text(json.dumps({"weights": weights}) + "\n")


def check_processes(saved: int, out: Path) -> None:
    """Raises ValueError where other processes took other shares of the data."""
    if saved != jax.process_count():
        raise ValueError(
            f"{out} holds a run of {saved} processes, got {jax.process_count()}: each has its "
            "share of the data, so start as many"
        )


def check_folder(config: TuneConfig, out: Path) -> None:
    """Writes the settings into a new folder; compares them with those of an old one.

    Raises:
        ValueError: the folder holds a run with other settings; names them.
    """
    path, mine = out / "config.json", json.loads(json.dumps(dataclasses.asdict(config)))
    if path.exists():
        theirs = read_json(path)[1]
        different = [
            f"{name}: {theirs.get(name)!r} there, {mine[name]!r} now"
            for name in mine
            if name not in FREE and theirs.get(name) != mine[name]
        ]
        if different:
            raise ValueError(f"{out} holds a run with other settings ({'; '.join(different)})")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(mine, indent=1) + "\n")
