"""Runs of two processes: they train together, one that is left alone stops, and the run goes on."""

import json
import signal
import time
import warnings

import jax
import numpy as np
import pytest
import several
from tuning_toys import tiny_checkpoint

import kvjax
from kvjax import processes, transmla
from kvjax.hf.source import copy_companions
from kvjax.tasks.families import rows
from train import log
from train.checkpoints import FOLDER, Checkpoints
from train.finetune.config import TuneConfig
from train.finetune.run import finetune
from train.finetune.setup import load

STEPS = 16
SETTINGS = {
    "sequence_length": 64,
    "batch_size": 4,
    "learning_rate": 3e-3,
    "dtype": "float32",
    "log_every": 2,
    "checkpoint_every": 4,
    "steps": STEPS,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model's conversion, and rows to train on."""
    out = tmp_path_factory.mktemp("tune")
    model, params = tiny_checkpoint(out / "gqa")
    kvjax.save(*transmla.convert(model, params), out / "mla")
    copy_companions(out / "gqa", out / "mla")
    lines = [json.dumps(row) + "\n" for row in rows("word_problems", 120, 0)]
    (out / "rows.jsonl").write_text("".join(lines))
    return out


def command(folder, out, *more):
    words = ["train", "finetune", "--out", out, "--model", folder / "mla"]
    words += ["--data", f"plain:{folder / 'rows.jsonl'}", "--mesh", "data=2,fsdp=2", *more]
    for name, value in SETTINGS.items():
        words += [f"--{name.replace('_', '-')}", value]
    return words


def reached(out, step):
    lines = log.read(out / "metrics.jsonl")
    return bool(lines) and lines[-1]["step"] >= step


def writing(out, step):
    """Whether a checkpoint from `step` on is being written: it gets its name in the end."""
    return reached(out, step) and any(not path.name.isdigit() for path in (out / FOLDER).iterdir())


def killed(words, out, victim, ready):
    """Kills one process when it is ready; the other says so and stops within a minute."""
    with several.started(words, out, variable=True) as both:
        while not ready() and all(process.is_alive() for process in both):
            time.sleep(0.002)
        both[victim].kill()
        other = 1 - victim
        assert several.ended(both[other], 60) == processes.GONE, several.lines(out, other)
        assert several.ended(both[victim], 10) == -signal.SIGKILL, several.lines(out, victim)
    line = several.lines(out, other)[-1]
    assert line.startswith("error: ") and "another process of the run is gone" in line
    assert "same command" in line


def parameters(folder, out):
    config = TuneConfig(str(folder / "mla"), (f"plain:{folder / 'rows.jsonl'}",), **SETTINGS)
    with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):  # for orbax
        warnings.simplefilter("ignore")
        checkpoints = Checkpoints(out, 2)
        step, state, data = checkpoints.load_newest(load(config)[1])
    return step, state, data


@pytest.mark.slow
def test_a_run_that_loses_processes_ends_as_one_that_does_not(folder, tmp_path):
    whole, killed_run = tmp_path / "whole", tmp_path / "killed"
    several.run(command(folder, whole, "--merge"), whole)
    lines = log.read(whole / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(2, STEPS + 1, 2))
    assert lines[-1]["loss"] < lines[0]["loss"]
    words = command(folder, killed_run)
    killed(words, killed_run, 1, lambda: reached(killed_run, 6))
    killed(words, killed_run, 0, lambda: writing(killed_run, 12))
    several.run(words, killed_run)
    (step, state, data), (also, other, rest) = (
        parameters(folder, out) for out in (whole, killed_run)
    )
    assert step == also == STEPS and data == rest
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(x, y)
    again = log.read(killed_run / "metrics.jsonl")
    assert [line["loss"] for line in again] == [line["loss"] for line in lines]
    _, merged = kvjax.load(whole / "model", "float32")
    assert merged["layers_0"].keys() == kvjax.load(folder / "mla", "float32")[1]["layers_0"].keys()
    with pytest.raises(ValueError, match="holds a run of 2 processes, got 1: each has its share"):
        config = json.loads((whole / "config.json").read_text())
        with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):
            warnings.simplefilter("ignore")
            finetune(TuneConfig(**{**config, "mesh": None}), whole)
