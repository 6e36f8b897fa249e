"""What 22 policies on the same prompts cost beyond reading the prompts and decoding.

    python -m benchmarks.many_policies [--models smollm2-135m needle] [--repeats 3]

`generate_each` reads the prompts once, ranks and packs the tokens for each policy, and decodes
under each policy, as `python -m eval` does. The parts alone are one pass over the prompts that
compresses nothing, and the decoding of the 22 caches. The ratio is the time of all divided by the
time of the two parts, measured in turns, after a first call that compiles. Head importance is
random.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

import kvjax
from benchmarks.cold_start_process import random_model
from benchmarks.environment import environment
from kvjax.decoding import Sampling, decode, first_token, prompt_keys, prompt_words
from kvjax.generation import generate_each
from kvjax.nn import Transformer
from kvjax.paths import local_path
from kvjax.policies.compression import Compression
from kvjax.policies.importance import HeadScores
from kvjax.policies.named import resolve
from kvjax.prefilling import compressions, prefill_in_groups, read_prompts

SIZES = (24, 32, 48, 64, 96, 128, 192)
NAMES = [f"{name}:kv_size={size}" for name in ("headkv", "snapkv", "streaming") for size in SIZES]
MODELS = {
    "smollm2-135m": lambda rng: random_model(30, rng),
    "needle": lambda rng: kvjax.load("builtin:needle", "float32"),
}
NO_EOS = np.zeros(0, np.int32)


class ReadOnly(Compression):
    """A policy that is given each layer's prompt and keeps nothing of it."""

    def compress(self, caches: Any, *rest: Any) -> Any:
        return caches


def main() -> None:
    args = arguments()
    rows = [measure(name, args) for name in args.models]
    result = {
        "what": f"22 policies, {args.batch} prompts of {args.length} tokens, {args.new} new tokens",
        "rows": rows,
        **environment("benchmarks.many_policies"),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {args.out}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=1000)
    parser.add_argument("--new", type=int, default=13)
    parser.add_argument("--repeats", type=int, default=3)
    results = Path("benchmarks/results/many_policies.json")
    parser.add_argument("--out", type=local_path, default=results)
    return parser.parse_args()


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The times of one model, wall seconds of each repeat."""
    rng = np.random.default_rng(0)
    model, params = MODELS[name](rng)
    config = model.config
    scores = HeadScores(rng.random((config.num_layers, config.query_heads, 3)) ** 4)
    policies = [resolve(policy, config, scores) for policy in ["full", *NAMES]]
    prompts = rng.integers(1, config.vocab_size, (args.batch, args.length)).tolist()
    times: dict[str, list[float]] = {"all": [], "read": [], "decode": []}
    for repeat in range(args.repeats + 1):
        start = time.perf_counter()
        generate_each(model, params, prompts, policies, args.new, eos_ids=())
        found = {
            "all": time.perf_counter() - start,
            **parts(model, params, prompts, policies, args),
        }
        if repeat:  # the first one compiles
            for part, seconds in found.items():
                times[part].append(seconds)
    ratios = [a / (r + d) for a, r, d in zip(*times.values(), strict=True)]
    row = {"model": name, "layers": config.num_layers, "ratio": statistics.median(ratios), **times}
    print({k: v for k, v in row.items() if not isinstance(v, list)}, flush=True)
    return row


def parts(
    model: Transformer, params: Any, prompts: list[list[int]], policies: Any, args: Any
) -> dict[str, float]:
    """Seconds of reading alone and of decoding alone."""
    tokens, lengths = np.asarray(prompts, np.int32), np.full(len(prompts), args.length, np.int32)
    works = compressions(model, params, lengths, policies, args.new)
    nothing = ReadOnly(**{f.name: getattr(works[0], f.name) for f in dataclasses.fields(works[0])})
    start = time.perf_counter()
    jax.block_until_ready(read_prompts(model, params, tokens, [nothing])[0])
    read = time.perf_counter() - start
    logits, caches = jax.block_until_ready(prefill_in_groups(model, params, tokens, works))
    keys = prompt_keys(jax.random.key(0), prompt_words(prompts))
    sampling = Sampling.create(0.0, 0, 1.0)
    state = jax.block_until_ready(first_token(logits, keys, sampling, NO_EOS))
    start = time.perf_counter()
    while caches:
        begin = dataclasses.replace(state, cache=caches.pop(0))
        for _ in decode(model, params, begin, sampling, NO_EOS, args.new):
            pass
    return {"read": read, "decode": time.perf_counter() - start}


if __name__ == "__main__":
    main()
