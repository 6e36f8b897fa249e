"""Seconds that the head importance of the embedded model takes, and how stable its ranking is.

    python -m benchmarks.importance [--out benchmarks/results/importance.json]

Every estimator on the grid that `kvjax score` asks (prompts up to --length tokens), and HeadKV-R2's
(retrieval_reasoning) again with every prompt at full length. Seconds include compilation, which is
also given apart.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import numpy as np

import kvjax
from benchmarks.environment import environment
from kvjax.example import Example
from kvjax.headkv.examples import QUESTIONS, Grid, make_examples
from kvjax.paths import local_path
from kvjax.policies.importance import split_half
from kvjax.tasks.words import TokenizerVocabulary

MODEL = "builtin:needle"


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        seconds: wall time of `score_examples`, compilation included.
        compile_seconds: tracing and compilation alone.
        accepted: examples that counted, of `samples`.
        split_half_spearman: of the heads' means over random halves of them, 20 splits.
    """

    estimator: str
    prompts: str
    samples: int
    tokens: int
    seconds: float
    compile_seconds: float
    cpu_seconds: float
    accepted: int
    split_half_spearman: float


def main() -> None:
    args = arguments()
    # Compilation is part of what is measured.
    jax.config.update("jax_enable_compilation_cache", False)
    model, params = kvjax.load(MODEL, dtype="float32")
    tokenizer = kvjax.load_tokenizer(MODEL)

    def measure(estimator: str, prompts: str, examples: Sequence[Example]) -> Row:
        jax.clear_caches()
        with compile_clock() as compiling:
            wall, cpu = time.perf_counter(), time.process_time()
            scores = kvjax.headkv.score_examples(model, params, examples, estimator=estimator)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return Row(
            estimator=estimator,
            prompts=prompts,
            samples=len(examples),
            tokens=sum(len(example.prompt) for example in examples),
            seconds=round(wall, 1),
            compile_seconds=round(sum(compiling), 1),
            cpu_seconds=round(cpu, 1),
            accepted=scores.samples.shape[2],
            split_half_spearman=round(split_half(scores), 4),
        )

    rows = []
    for estimator in args.estimators:
        grid = Grid(estimator, args.samples, args.length)
        examples = make_examples(tokenizer, grid)
        rows.append(measure(estimator, f"grid up to {args.length}", examples))
        print(rows[-1], flush=True)
    examples = full_length(tokenizer, args.samples, args.length)
    rows.append(measure("retrieval_reasoning", f"all {args.length}", examples))
    print(rows[-1])
    result = {
        "what": f"head importance of {MODEL}, {args.samples} samples",
        "rows": [asdict(row) for row in rows],
        **environment("benchmarks.importance"),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {args.out}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=local_path, default=Path("benchmarks/results/importance.json")
    )
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--estimators", nargs="+", default=list(QUESTIONS))
    return parser.parse_args()


def full_length(tokenizer: object, samples: int, length: int) -> list[Example]:
    """Questions of retrieval_reasoning: prompts of `length` tokens, depths from start to end."""
    vocab, rng = TokenizerVocabulary(tokenizer), np.random.default_rng(0)
    ask = QUESTIONS["retrieval_reasoning"]
    depths = np.linspace(0.0, 1.0, samples).tolist()
    return [ask(rng, vocab, length, index, depth, None) for index, depth in enumerate(depths)]


@contextmanager
def compile_clock() -> Iterator[list[float]]:
    """Seconds of every tracing, lowering and compilation that happens meanwhile."""
    seconds: list[float] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.startswith("/jax/core/compile/"):
            seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


if __name__ == "__main__":
    main()
