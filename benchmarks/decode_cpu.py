"""Tokens a second of kvjax and of transformers' generate (torch, sdpa) on one CPU, in one run.

    python -m benchmarks.decode_cpu [--out benchmarks/results/decode_cpu.json]

Both generate from the same random llama checkpoint, which this script writes with transformers to a
temporary directory. A time is that of a whole call, prefill included, after one call that compiles;
the two take turns, so that whatever else the machine does meets both. Needs the parity extra.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

from benchmarks.environment import environment

Generate = Callable[[np.ndarray, int], list[list[int]]]
"""(prompts [B, T], new tokens) → the new tokens of each prompt, greedy."""

LLAMA = {
    "vocab_size": 32_000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


@dataclass
class Row:
    """One line of the table.

    `seconds` are those of single calls: wall, and of the processor in all threads. The latter say
    more on a busy machine, but count threads that spin as well: compare them at --threads 1.
    """

    dtype: str
    batch: int
    kvjax_tokens_per_s: float
    transformers_tokens_per_s: float
    ratio: float
    kvjax_seconds: list[float]
    transformers_seconds: list[float]
    kvjax_cpu_seconds: list[float]
    transformers_cpu_seconds: list[float]
    kvjax_first_call_s: float
    same_tokens: float


def main() -> None:
    args = arguments()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    with tempfile.TemporaryDirectory() as directory:
        parameters = write_checkpoint(directory)
        rows = []
        for dtype in args.dtypes:
            ours, theirs = load_kvjax(directory, dtype), load_torch(directory, dtype, args.threads)
            for batch in args.batches:
                rows.append(compare(ours, theirs, dtype, batch, args))
                print(line(rows[-1]), flush=True)
    result = {
        "what": f"{parameters / 1e6:.0f} M parameters, prompt {args.prompt}, {args.new} new tokens",
        "parameters": parameters,
        "arguments": {k: v for k, v in vars(args).items() if k != "out"},
        "rows": [asdict(row) for row in rows],
        **environment("benchmarks.decode_cpu", ("jax", "torch", "transformers")),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {args.out}")


def arguments() -> argparse.Namespace:
    from kvjax.paths import local_path

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=local_path, default=Path("benchmarks/results/decode_cpu.json")
    )
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def write_checkpoint(directory: str) -> int:
    """A random llama in Hugging Face's layout; returns its number of parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    model.save_pretrained(directory)
    return model.num_parameters()


def load_kvjax(directory: str, dtype: str) -> Generate:
    import kvjax
    from kvjax.generation import generate

    model, params = kvjax.load(directory, dtype=dtype)

    def run(prompts: np.ndarray, new: int) -> list[list[int]]:
        return generate(model, params, prompts.tolist(), max_new_tokens=new, eos_ids=()).tokens

    return run


def load_torch(directory: str, dtype: str, threads: int) -> Generate:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    )
    model.eval()

    def run(prompts: np.ndarray, new: int) -> list[list[int]]:
        ids = torch.from_numpy(prompts)
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False
            )
        return out[:, ids.shape[1] :].tolist()

    return run


def compare(
    ours: Generate, theirs: Generate, dtype: str, batch: int, args: argparse.Namespace
) -> Row:
    """Both on the same prompts, in turns."""
    shape = (batch, args.prompt)
    prompts = np.random.default_rng(batch).integers(0, LLAMA["vocab_size"], shape)
    first, _, our_tokens = timed(ours, prompts, args.new)
    _, _, their_tokens = timed(theirs, prompts, args.new)
    our_times, their_times = [], []
    for _ in range(args.repeats):
        our_times.append(timed(ours, prompts, args.new)[:2])
        their_times.append(timed(theirs, prompts, args.new)[:2])
    (our_wall, our_cpu), (their_wall, their_cpu) = (
        zip(*our_times, strict=True),
        zip(*their_times, strict=True),
    )
    speeds = [batch * args.new / statistics.median(wall) for wall in (our_wall, their_wall)]
    return Row(
        dtype=dtype,
        batch=batch,
        kvjax_tokens_per_s=speeds[0],
        transformers_tokens_per_s=speeds[1],
        ratio=speeds[0] / speeds[1],
        kvjax_seconds=list(our_wall),
        transformers_seconds=list(their_wall),
        kvjax_cpu_seconds=list(our_cpu),
        transformers_cpu_seconds=list(their_cpu),
        kvjax_first_call_s=first,
        same_tokens=float(np.mean(np.asarray(our_tokens) == np.asarray(their_tokens))),
    )


def timed(
    generate: Generate, prompts: np.ndarray, new: int
) -> tuple[float, float, list[list[int]]]:
    """Wall seconds, processor seconds, and the tokens."""
    wall, cpu = time.perf_counter(), time.process_time()
    tokens = generate(prompts, new)
    return time.perf_counter() - wall, time.process_time() - cpu, tokens


def line(row: Row) -> str:
    return (
        f"{row.dtype:9} batch {row.batch}: kvjax {row.kvjax_tokens_per_s:7.1f} tokens/s, "
        f"transformers {row.transformers_tokens_per_s:7.1f}, ratio {row.ratio:.2f}, "
        f"processor seconds {statistics.median(row.kvjax_cpu_seconds):.2f} to "
        f"{statistics.median(row.transformers_cpu_seconds):.2f} "
        f"(first call {row.kvjax_first_call_s:.0f} s, same tokens {row.same_tokens:.0%})"
    )


if __name__ == "__main__":
    main()
