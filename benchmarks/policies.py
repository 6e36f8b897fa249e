"""Every policy on the embedded model, at equal KV sizes: what is lost, and against which bytes.

    python -m benchmarks.policies [--prompts 168] [--seeds 0 1 2]

One prefill a prompt serves all policies and sizes. Prompts of 1024 tokens ask for one fact, for one
of six, or for the fact of the older of two people, with answers of 1 to 3 or of 8 to 12 words; the
question is part of the compressed prompt, or asked after its compression. Each finished part (a
protocol and a seed) is kept, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

import kvjax
from benchmarks.environment import environment
from kvjax.example import Example
from kvjax.paths import local_path
from kvjax.policies.importance import HeadScores, default_scores
from kvjax.policies.named import parse_policy, resolve
from kvjax.policies.policy import Compress
from kvjax.scoring import FULL, PROTOCOLS, compare
from kvjax.tasks import make_examples
from kvjax.tasks.words import TokenizerVocabulary

MODEL, LENGTH = "builtin:needle", 1024
TASKS = ("needle", "multi_key", "two_hop")
ANSWERS = {"short": (1, 3), "long": (8, 12)}
SIZES = (12, 20, 51, 102, 256)
POLICIES = (
    "headkv",
    "headkv_paper",
    "headkv_adaptive",
    "snapkv",
    "spankv",
    "pyramidkv",
    "adasnapkv",
    "h2o",
    "streaming",
    "tova",
    "knorm",
    "keydiff",
    "expected",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=local_path, default=Path("benchmarks/results/policies.json"))
    parser.add_argument("--prompts", type=int, default=168, help="of each seed and protocol")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--protocols", nargs="+", default=list(PROTOCOLS))
    args = parser.parse_args()
    settings = {
        name: getattr(args, name) for name in ("prompts", "seeds", "sizes", "policies", "protocols")
    }
    result = resume(args.out, settings)
    start = time.monotonic() - result.get("seconds", 0.0)
    model, params = kvjax.load(MODEL, dtype="float32")
    vocab = TokenizerVocabulary(kvjax.load_tokenizer(MODEL))
    scores = default_scores(model.config)
    policies = {
        label(name, size): sized(name, size, model.config, scores)
        for size in args.sizes
        for name in args.policies
    }
    parts = [(protocol, seed) for protocol in args.protocols for seed in args.seeds]
    with Progress() as progress:
        bar = progress.add_task("prompts", total=len(parts) * args.prompts)
        for protocol, seed in parts:
            key = f"{protocol} {seed}"
            if key not in result["parts"]:
                examples, kinds = questions(vocab, args.prompts, seed)
                done = 0

                def advance(count: int) -> None:
                    nonlocal done
                    progress.advance(bar, count - done)
                    done = count

                out = compare(model, params, examples, policies, protocol, on_batch=advance)
                result["parts"][key] = {
                    "kinds": kinds,
                    "right": {name: bits(found) for name, found in out.right.items()},
                }
                result["bytes"] = out.cache_bytes
                result["seconds"] = round(time.monotonic() - start, 1)
                result |= environment("benchmarks.policies")
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(result, indent=1) + "\n")
            else:
                progress.advance(bar, args.prompts)
    print(f"written to {args.out}; python -m benchmarks.policies_report makes table and picture")


def resume(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The unfinished result at `path`, if it has these settings; otherwise an empty one."""
    if path.exists():
        found = json.loads(path.read_text())
        if found["settings"] == settings:
            return found
    return {"model": MODEL, "length": LENGTH, "settings": settings, "parts": {}}


def label(name: str, size: int) -> str:
    """A policy and its KV size, as the result names them."""
    return f"{name} @ {size}"


def sized(name: str, size: int, config: Any, scores: HeadScores | None) -> Compress:
    """The policy at a KV size, with the model's head scores where it needs any."""
    policy = resolve(
        parse_policy(f"{name}{',' if ':' in name else ':'}kv_size={size}"), config, scores
    )
    assert isinstance(policy, Compress), f"{name} compresses nothing; {FULL} is measured anyway"
    return policy


def questions(vocab: Any, count: int, seed: int) -> tuple[list[Example], list[str]]:
    """So many examples, evenly of every task and length of answer, and what each one is."""
    groups = [(task, length) for task in TASKS for length in ANSWERS]
    each = -(-count // len(groups))
    examples, kinds = [], []
    for task, length in groups:
        examples += make_examples(task, vocab, each, LENGTH, seed, ANSWERS[length])
        kinds += [f"{task} {length}"] * each
    order = np.random.default_rng(seed).permutation(len(examples))[:count]
    return [examples[i] for i in order], [kinds[i] for i in order]


def bits(found: np.ndarray) -> str:
    """Which items were right, as a string of 0 and 1."""
    return "".join("1" if right else "0" for right in found)


if __name__ == "__main__":
    main()
