"""Problems and runs of a comparison, and the accuracy of a model on families of problems.

A run writes one file when it ends: an interrupted comparison repeats unfinished runs only.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Len

import kvjax
from kvjax import runs
from kvjax.checks import COUNT, SEED, check_finite, check_ranges
from kvjax.fields import Number, Positive, Says, object_problems, refuse
from kvjax.nn import Transformer
from kvjax.prefilling import bucket_length
from kvjax.runs import write_whole
from kvjax.tasks import WordVocabulary
from kvjax.tasks.families import problems, rows
from kvjax.tasks.prompt import Problem
from kvjax.text_files import read_object
from train.compare.config import ARMS, CompareConfig, Job, search_jobs
from train.data import DataConfig, SourceConfig, check_documents, epochs_for, make_loader
from train.finetune.setup import partition, trainable_paths
from train.finetune.step import (
    CompiledStep,
    Flat,
    TuneStep,
    adamw,
    compile_step,
    learning_rate,
    merged,
)

DATA = "data"
"""The folder of the families' problems, inside that of the comparison."""


def write_rows(path: Path, family: str, count: int, seed: int = 0, split: str = "train") -> None:
    """Writes problems of a family (`kvjax.tasks.families.rows`) as JSON lines.

    Raises:
        ValueError: an unknown family or split, a count below 1, or a negative seed.
    """
    check_ranges({"count": count, "seed": seed}, {"count": COUNT, "seed": SEED})
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows(family, count, seed, split)))


def family_accuracy(
    model: Transformer,
    params: Any,
    problems: Sequence[Problem],
    batch_size: int = 64,
    max_new_tokens: int = 32,
) -> tuple[float, float, list[str]]:
    """Share of the problems that greedy decoding with the full cache solves.

    Args:
        model: with the project's word vocabulary.
        batch_size: number of prompts at a time.

    Returns:
        Accuracy p, its standard error sqrt(p(1 − p)/n), and the text of each problem's answer.

    Raises:
        ValueError: no problems.
    """
    if not problems:
        raise ValueError("got no problems, expected at least one")
    vocab = WordVocabulary()
    prompts = [[vocab.bos_id, *vocab.encode(problem.query)] for problem in problems]
    texts = [""] * len(problems)
    for bucket in sorted({bucket_length(len(prompt)) for prompt in prompts}):
        indices = [i for i, prompt in enumerate(prompts) if bucket_length(len(prompt)) == bucket]
        # Repeat a prompt until the last batch is full: each length bucket then compiles once.
        fill = [indices[0]] * (-len(indices) % batch_size)
        chosen = [prompts[i] for i in (*indices, *fill)]
        out = kvjax.generate(
            model, params, chosen, max_new_tokens, eos_ids=[vocab.eos_id], batch_size=batch_size
        )
        for index, ids in zip(indices, out.tokens, strict=False):
            texts[index] = vocab.decode(ids)
    right = [problem.solved(text) for problem, text in zip(problems, texts, strict=True)]
    share = sum(right) / len(right)
    return share, (share * (1 - share) / len(right)) ** 0.5, texts


def write_data(config: CompareConfig, out: Path) -> None:
    """Writes training and held-out problems to files, where no data is given."""
    for family in () if config.data else config.families:
        drawn = {
            "train": problems(family, config.rows, seed=0),
            "validation": test_problems(config, family)[config.problems :],
        }
        for split_name, found in drawn.items():
            lines = [{"query": p.query, "response": p.response} for p in found]
            path = Path(config.sources(split_name, out / DATA)[family].path)
            runs.write_whole(path, "".join(json.dumps(x) + "\n" for x in lines))


def test_problems(config: CompareConfig, family: str) -> list[Problem]:
    """Problems that no training row repeats: first the ones to answer, then the ones of the loss.

    They have another seed than 0, because the families were designed by looking at that one.
    """
    return problems(family, config.problems + config.eval_rows, seed=1, split="test")


@functools.lru_cache(maxsize=2)
def trainer(config: CompareConfig, out: Path, arm: str) -> Trainer:
    """This process's trainer of an arm; cached, so that all runs of the arm share its programs."""
    return Trainer.create(config, out, arm)


def best_rate(config: CompareConfig, out: Path, arm: str) -> float:
    """The rate whose short run ended with the smallest held-out loss.

    Raises:
        ValueError: the loss of every short run became NaN.
    """
    results = [read_result(out, job) for job in search_jobs(config, arm)]
    finite = [result for result in results if result["held_out"][-1][1] is not None]
    if not finite:
        raise ValueError(f"{arm}: the loss became NaN at every rate of {list(config.rates)}")
    return min(finite, key=lambda result: result["held_out"][-1][1])["rate"]


def read_result(out: Path, job: Job) -> dict[str, Any]:
    """The result that `Trainer.run_once` wrote."""
    path = out / "runs" / f"{job.name}.json"
    result = read_object(path)
    refuse(object_problems(result, RESULT), str(path))
    return result


Loss = Annotated[list[Number | None], Len(2, 2), Says("a step and its loss")]
RESULT = {"rate": Positive, "held_out": Annotated[list[Loss], Len(1)]}
"""Fields of a run's result that choose the rate."""


@dataclass
class Trainer:
    """One arm, compiled once: its runs differ in rate and order of data only.

    Attributes:
        step: the step, in fp32: small models on a CPU gain nothing from bf16.
        trainable, frozen: parameters at the start of every run.
        held_out: by source, batches of the held-out rows.
        compiled: the compiled step, after the first run has begun.
    """

    config: CompareConfig
    out: Path
    tokenizer: Any
    step: TuneStep
    trainable: Flat
    frozen: Flat
    held_out: dict[str, list[dict[str, jax.Array]]]
    compiled: CompiledStep | None = None

    @classmethod
    def create(cls, config: CompareConfig, out: Path, arm: str) -> Trainer:
        """Loads the model and converts it."""
        original, params = kvjax.load(config.model, dtype="float32")
        check_finite(params, f"{config.model}: ")
        # Every arm starts as the same function: conversion keeps the logits.
        model, params = ARMS[arm].convert(original, params)
        paths = trainable_paths(model, params, ARMS[arm].patterns(original))
        trainable, frozen = partition(params, paths)
        tokenizer = kvjax.load_tokenizer(config.model)
        step = TuneStep(model, adamw(0.9, 0.999, 0.0, 1.0), dtype="float32")
        train = _data(config, config.sources("train", out / DATA).values(), config.rows)
        others = {
            name: _data(config, [source], config.eval_rows)
            for name, source in config.sources("validation", out / DATA).items()
        }
        for data in (train, *others.values()):
            check_documents(data, tokenizer, model.config.vocab_size, model.config.context_length)
        held_out = {
            name: [jax.device_put(batch) for batch in make_loader(data, tokenizer)]
            for name, data in others.items()
        }
        return cls(config, out, tokenizer, step, trainable, frozen, held_out)

    def run_once(self, job: Job) -> None:
        """Trains, measures and writes the run's file, unless the file exists.

        A search run whose loss becomes NaN ends early with None as its last loss, so that its rate
        is not chosen.

        Raises:
            ValueError: the loss of a run that is reported became NaN; no file is written.
        """
        path = self.out / "runs" / f"{job.name}.json"
        if path.exists():
            return
        started = time.monotonic()
        state = self.step.init(self.trainable)
        sources = self.config.sources("train", self.out / DATA).values()
        data = _data(self.config, sources, self.config.rows, job.seed)
        data = epochs_for(data, self.tokenizer, job.steps)
        batches = iter(make_loader(data, self.tokenizer))
        losses: list[jax.Array] = []
        loss, each = self.held_out_losses(state.params)
        held_out: list[tuple[int, float | None]] = [(0, loss)]
        of_source = [each]
        for number in range(job.steps):
            batch = jax.device_put(next(batches))
            rate = jnp.float32(learning_rate(number, job.steps, job.rate, self.config.warmup))
            arguments = state, self.frozen, batch, rate, None
            if self.compiled is None:
                self.compiled = compile_step(self.step, *arguments)
            state, metrics = self.compiled.call(*arguments)
            losses.append(metrics["loss"])  # stays on the device until it is needed
            if (number + 1) % self.config.eval_every == 0 or number + 1 == job.steps:
                loss, each = self.held_out_losses(state.params)
                # A finite held-out loss can follow a step with a loss that was not finite.
                if not np.isfinite([loss, *losses[-self.config.eval_every :]]).all():
                    diverged(job, number + 1)
                    held_out, losses = [*held_out, (number + 1, None)], []
                    break
                held_out.append((number + 1, loss))
                of_source.append(each)
        result = {
            "arm": job.arm,
            "rate": job.rate,
            "seed": job.seed,
            "steps": job.steps,
            "trainable": sum(leaf.size for leaf in self.trainable.values()),
            "loss": [round(float(loss), 5) for loss in losses],
            "held_out": held_out,
            "held_out_of": of_source,
            "accuracy": {} if job.search or self.config.data else self.accuracies(state),
            "seconds": round(time.monotonic() - started, 1),
        }
        runs.write_whole(path, json.dumps(result) + "\n")

    def held_out_losses(self, masters: Flat) -> tuple[float, dict[str, float]]:
        """Mean cross-entropy of the held-out answers, nats a token: of all, and of each source."""
        total, weight, each = 0.0, 0.0, {}
        for name, batches in self.held_out.items():
            sums = [self.step.losses(masters, self.frozen, batch) for batch in batches]
            loss, count = sum(float(s.loss) for s in sums), sum(float(s.weight) for s in sums)
            each[name] = round(loss / count, 5)
            total, weight = total + loss, weight + count
        return round(total / weight, 5), each

    def accuracies(self, state: Any) -> dict[str, Any]:
        """Share of generated answers that are right, with its standard error, per family."""
        params = merged(state, self.frozen, "float32")
        return test_accuracies(self.config, self.step.model, params)


def diverged(job: Job, step: int) -> None:
    """Raises ValueError for a run that is reported; a search run may diverge."""
    if not job.search:
        raise ValueError(
            f"{job.arm}, rate {job.rate:g}, seed {job.seed}: the loss is NaN or infinite at step "
            f"{step}, expected finite numbers; take other rates"
        )


def test_accuracies(config: CompareConfig, model: Any, params: Any) -> dict[str, Any]:
    """Accuracy of a model on test problems that no training row repeats, with standard errors."""
    found = {}
    for family in config.families:
        asked = test_problems(config, family)[: config.problems]
        share, error, texts = family_accuracy(model, params, asked)
        # Accuracy of each kind of problem within the family.
        kinds: dict[str, list[bool]] = {}
        for problem, text in zip(asked, texts, strict=True):
            kinds.setdefault(problem.kind, []).append(problem.solved(text))
        found[family] = {
            "accuracy": round(share, 4),
            "standard_error": round(error, 4),
            "kinds": {kind: round(float(np.mean(right)), 3) for kind, right in kinds.items()},
        }
    return found


def _data(
    config: CompareConfig,
    sources: Iterable[SourceConfig],
    rows: int,
    seed: int = 0,
) -> DataConfig:
    """One epoch of at most `rows` rows of each source."""
    return DataConfig(
        sources=tuple(sources),
        sequence_length=config.sequence_length,
        batch_size=config.batch_size,
        epochs=1,
        seed=seed,
        max_rows=rows,
    )
