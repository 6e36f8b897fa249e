"""What each part of the decoupled conversion is worth: perplexity and accuracy, row by row.

    python -m benchmarks.transmla --data ../shared/data [--out benchmarks/results/transmla.json]

On two real models: stories260k, calibrated on calibration.npy and scored on heldout.npy, and the
embedded model, calibrated on prompts of its own kind and scored on others. Choices (rope_dim, and
sizes per layer) are made on an eighth of the calibration text, which the moments then do not see.
Rows are appended as they come; a second run skips those that are there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

import kvjax
from benchmarks.environment import environment
from kvjax.paths import local_path
from kvjax.tasks import WordVocabulary, accuracy, make_examples, perplexity
from kvjax.transmla import BEST, Recipe, calibrate, closed_form, published, rotary
from kvjax.transmla.allocation import allocate_sizes, choose_rope_dim
from kvjax.transmla.distill import distill

SHARES = (0.75, 0.5, 0.28)
TASKS = ("needle", "multi_key", "two_hop")
ALL = (
    "published",
    "+ complex unitaries",
    "+ best constants",
    "+ placement",
    "+ centred",
    "+ aware metric",
    "+ least squares (default)",
)
FEW = (ALL[0], *ALL[-2:])
SHAPE = {"prompts": 64, "length": 1008}


@dataclass(frozen=True)
class Workload:
    """A model, what it is calibrated on, and how it is scored.

    Attributes:
        calibration: int32 [S, T].
        score: (model, params) → metrics.
        head_dim, cache: rope_dim of the published method, and numbers a token and layer of GQA.
        rope_dims: for each share the candidates of the free placement.
        steps: the recipes that are scored.
        step: granularity of sizes per layer at half the cache, with the other variants; None for
            no variants.
    """

    name: str
    model: Any
    params: Any
    calibration: np.ndarray
    score: Callable[[Any, Any], dict[str, float]]
    head_dim: int
    cache: int
    rope_dims: tuple[int, ...]
    steps: tuple[str, ...]
    step: int | None


def stories(data: Path) -> Workload:
    """stories260k, perplexity on the held-out chunks."""
    directory = data / "checkpoints" / "stories260k"
    model, params = kvjax.load(directory, dtype="float32")
    held = np.load(directory / "heldout.npy").astype(np.int32)
    batches = [held[i : i + 32] for i in range(0, len(held), 32)]

    def score(model: Any, params: Any) -> dict[str, float]:
        return {"perplexity": perplexity(model, params, batches)}

    calibration = np.load(directory / "calibration.npy").astype(np.int32)
    return Workload("stories260k", model, params, calibration, score, 8, 64, (4, 8, 12, 16), ALL, 2)


def embedded(data: Path) -> Workload:
    """The embedded model: teacher-forced exact match of whole answers, and perplexity."""
    model, params = kvjax.load("builtin:needle", dtype="float32")
    vocab = WordVocabulary()

    def rows(seed: int, count: int) -> np.ndarray:
        examples = [
            example
            for task in TASKS
            for example in make_examples(task, vocab, count, SHAPE["length"], seed, (12, 12))
        ]
        return np.asarray([[*e.prompt, *e.answer, vocab.eos_id] for e in examples], np.int32)

    held = rows(2000, 4)
    asked = {task: make_examples(task, vocab, SHAPE["prompts"], SHAPE["length"]) for task in TASKS}

    def score(model: Any, params: Any) -> dict[str, float]:
        found = {t: accuracy(model, params, e, vocab.eos_id) for t, e in asked.items()}
        return {"perplexity": perplexity(model, params, [held]), **found}

    calibration = np.random.default_rng(0).permutation(rows(1000, 12))
    return Workload(
        "needle", model, params, calibration, score, 32, 256, (16, 32, 48, 64), FEW, None
    )


STEPS: dict[str, Recipe] = {
    "published": published(1),
    "+ complex unitaries": dataclasses.replace(
        published(1), rotation=rotary.complex_rotation, recalibrate=False
    ),
}
STEPS["+ best constants"] = dataclasses.replace(
    STEPS["+ complex unitaries"], constants=closed_form.expected
)
STEPS["+ placement"] = dataclasses.replace(STEPS["+ best constants"], placement=rotary.by_energy)
STEPS["+ centred"] = dataclasses.replace(STEPS["+ placement"], centred=True)
STEPS["+ aware metric"] = dataclasses.replace(STEPS["+ centred"], metric=closed_form.aware)
STEPS["+ least squares (default)"] = BEST


class Run:
    """Rows of one workload, appended to the result."""

    def __init__(self, work: Workload, out: Path, result: dict[str, Any]):
        self.work, self.out, self.result = work, out, result
        self.stats = calibrate(work.model, work.params, _batches(work.calibration))
        split = np.arange(len(work.calibration)) % 8 == 7
        fit, self.choice = work.calibration[~split], work.calibration[split]
        self.fit = calibrate(work.model, work.params, _batches(fit))

    def all(self) -> None:
        """Every row of the table."""
        work = self.work
        self._row("original", 1.0, {}, lambda: (work.model, work.params))
        for share in SHARES:
            cache = round(share * work.cache)
            fixed = {"rope_dim": work.head_dim, "kv_rank": cache - work.head_dim}
            free = self._free(cache)
            for name in work.steps:
                sizes = fixed if STEPS[name].placement is not rotary.by_energy else free
                self._convert(name, share, sizes, recipe=STEPS[name])
            if share == 0.5 and work.step is not None:
                self._convert("default, exportable", share, {**fixed, "exportable": True})
                wide = 2 * work.head_dim
                self._convert("default, v_head_dim 2H", share, {**free, "v_head_dim": wide})
                self._convert("default, sizes per layer", share, self._per_layer(free, work.step))
                self._distilled(share, free)

    def _free(self, cache: int) -> dict[str, int]:
        width = choose_rope_dim(
            self.work.model,
            self.work.params,
            self.fit,
            self.choice,
            cache=cache,
            candidates=self.work.rope_dims,
        )
        return {"rope_dim": width, "kv_rank": cache - width}

    def _per_layer(self, sizes: dict[str, int], step: int) -> dict[str, Any]:
        ranks, ropes = allocate_sizes(
            self.work.model,
            self.work.params,
            self.fit,
            self.choice,
            kv_rank=sizes["kv_rank"],
            rope_dim=sizes["rope_dim"],
            step=step,
            rounds=4,
        )
        return {"rope_dim": ropes, "kv_rank": ranks}

    def _convert(self, name: str, share: float, sizes: dict[str, Any], **options: Any) -> None:
        def make() -> tuple[Any, Any]:
            return kvjax.transmla.convert(
                *(self.work.model, self.work.params),
                method="decoupled",
                stats=self.stats,
                **sizes,
                **options,
            )

        self._row(name, share, sizes, make)

    def _distilled(self, share: float, sizes: dict[str, int]) -> None:
        def make() -> tuple[Any, Any]:
            original = (self.work.model, self.work.params)
            model, params = kvjax.transmla.convert(
                *original, method="decoupled", stats=self.stats, **sizes
            )
            return model, distill(*original, model, params, self.stats, steps=400)

        self._row("default, then layerwise distillation", share, sizes, make)

    def _row(
        self, name: str, share: float, sizes: dict[str, Any], make: Callable[[], tuple[Any, Any]]
    ) -> None:
        key = {"model": self.work.name, "cache": share, "row": name}
        if any(all(row[k] == v for k, v in key.items()) for row in self.result["rows"]):
            return
        start = time.monotonic()
        model, params = make()
        seconds = time.monotonic() - start
        row = {**key, **sizes, **self.work.score(model, params), "seconds": round(seconds, 1)}
        print(json.dumps(row), flush=True)
        self.result["rows"].append(row)
        self.out.write_text(json.dumps(self.result, indent=1) + "\n")


def _batches(tokens: np.ndarray) -> list[np.ndarray]:
    return [tokens[i : i + 8] for i in range(0, len(tokens), 8)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=local_path, default=Path("../shared/data"))
    parser.add_argument("--out", type=local_path, default=Path("benchmarks/results/transmla.json"))
    args = parser.parse_args()
    result = {"environment": environment("benchmarks.transmla"), "rows": []}
    if args.out.exists():
        result = json.loads(args.out.read_text())
    for build in (stories, embedded):
        Run(build(args.data), args.out, result).all()


if __name__ == "__main__":
    main()
