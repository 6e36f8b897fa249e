"""Tokens a second of kvjax and of transformers' generate (torch, sdpa) on one CPU, in one run.

    python -m benchmarks.decode_cpu [--out benchmarks/results/decode_cpu.json]

Both generate from the same random llama checkpoints, which this script writes with transformers to
a temporary directory. The first token is a call that asks for one token; the rest is what a call
with more tokens takes beyond that. All calls come after one that compiles, and the two take turns,
so that whatever else the machine does meets both. The rate of a bare matrix product, the largest of
the model's prefill, says what the machine allows. Needs the parity extra.
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

MODELS = {
    "llama-100m": {
        "vocab_size": 32_000,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "smollm2-135m": {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
}
NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}


@dataclass
class Row:
    """One line of the table.

    `seconds` are those of single calls, wall: of the first token, and of the other tokens.
    """

    model: str
    dtype: str
    batch: int
    first_token_ratio: float
    decode_ratio: float
    kvjax_tokens_per_s: float
    transformers_tokens_per_s: float
    kvjax_first_s: list[float]
    transformers_first_s: list[float]
    kvjax_rest_s: list[float]
    transformers_rest_s: list[float]
    kvjax_prefill_gflops: float
    bare_matmul_gflops: float
    kvjax_first_call_s: float
    same_tokens: float


def main() -> None:
    args = arguments()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    rows = []
    for name in args.models:
        with tempfile.TemporaryDirectory() as directory:
            write_checkpoint(directory, MODELS[name])
            for dtype in args.dtypes:
                pair = load_kvjax(directory, dtype), load_torch(directory, dtype, args.threads)
                for batch in args.batches:
                    rows.append(compare(pair, name, dtype, batch, args))
                    print(line(rows[-1]), flush=True)
    result = {
        "what": f"prompt {args.prompt}, {args.new} new tokens",
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
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prompt", type=int, default=1000)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def write_checkpoint(directory: str, shape: dict[str, Any]) -> None:
    """A random llama in Hugging Face's layout."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**shape, **NO_IDS, max_position_embeddings=2048)
    LlamaForCausalLM(config).save_pretrained(directory)


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
    pair: tuple[Generate, Generate], name: str, dtype: str, batch: int, args: argparse.Namespace
) -> Row:
    """Both on the same prompts, in turns."""
    shape, model = (batch, args.prompt), MODELS[name]
    prompts = np.random.default_rng(batch).integers(0, model["vocab_size"], shape)
    first_call, _ = timed(pair[0], prompts, args.new)
    tokens = [generate(prompts, args.new) for generate in pair]
    first: tuple[list[float], list[float]] = [], []
    rest: tuple[list[float], list[float]] = [], []
    for _ in range(args.repeats):
        for side, generate in enumerate(pair):
            first[side].append(timed(generate, prompts, 1)[0])
            rest[side].append(timed(generate, prompts, args.new)[0] - first[side][-1])
    first_s, rest_s = ([statistics.median(each) for each in times] for times in (first, rest))
    return Row(
        model=name,
        dtype=dtype,
        batch=batch,
        first_token_ratio=first_s[1] / first_s[0],
        decode_ratio=rest_s[1] / rest_s[0],
        kvjax_tokens_per_s=batch * (args.new - 1) / rest_s[0],
        transformers_tokens_per_s=batch * (args.new - 1) / rest_s[1],
        kvjax_first_s=first[0],
        transformers_first_s=first[1],
        kvjax_rest_s=rest[0],
        transformers_rest_s=rest[1],
        kvjax_prefill_gflops=batch * args.prompt * layer_flops(model) / first_s[0] / 1e9,
        bare_matmul_gflops=matmul_rate(model, dtype, batch * args.prompt),
        kvjax_first_call_s=first_call,
        same_tokens=float(np.mean(np.asarray(tokens[0]) == np.asarray(tokens[1]))),
    )


def layer_flops(model: dict[str, Any]) -> int:
    """Of a token's products with the weights of all layers."""
    D, F, N = model["hidden_size"], model["intermediate_size"], model["num_attention_heads"]
    kv = D * model["num_key_value_heads"] // N
    return 2 * model["num_hidden_layers"] * (2 * D * D + 2 * D * kv + 3 * D * F)


def matmul_rate(model: dict[str, Any], dtype: str, rows: int) -> float:
    """GFLOP/s of the product of an MLP's up-projection, the median of nine."""
    import jax
    import jax.numpy as jnp

    D, F = model["hidden_size"], model["intermediate_size"]
    x, w = jnp.ones((rows, D), dtype), jnp.ones((D, F), dtype)
    product = jax.jit(lambda x, w: jnp.dot(x, w, preferred_element_type=jnp.float32))
    product(x, w).block_until_ready()
    times = []
    for _ in range(9):
        start = time.perf_counter()
        product(x, w).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * rows * D * F / statistics.median(times) / 1e9


def timed(generate: Generate, prompts: np.ndarray, new: int) -> tuple[float, list[list[int]]]:
    """Wall seconds, and the tokens."""
    start = time.perf_counter()
    tokens = generate(prompts, new)
    return time.perf_counter() - start, tokens


def line(row: Row) -> str:
    return (
        f"{row.model} {row.dtype:9} batch {row.batch}: first token "
        f"{statistics.median(row.kvjax_first_s):.2f} s to "
        f"{statistics.median(row.transformers_first_s):.2f} ({row.first_token_ratio:.2f}), decode "
        f"{row.kvjax_tokens_per_s:.1f} tokens/s to {row.transformers_tokens_per_s:.1f} "
        f"({row.decode_ratio:.2f}); prefill {row.kvjax_prefill_gflops:.0f} of "
        f"{row.bare_matmul_gflops:.0f} GFLOP/s, same tokens {row.same_tokens:.0%}"
    )


if __name__ == "__main__":
    main()
