"""Training steps: only K and V against all parameters, and kvjax against torch, on one CPU.

    python -m benchmarks.train_step [--out benchmarks/results/train_step.json]

Three contenders, each in a process of its own, train the same random llama in fp32 on two threads,
with AdamW: kvjax with what `kv_only` names, kvjax with everything, and transformers' model in torch
with the same K and V. They take turns, a step at a time, so that whatever else the machine does
meets all of them; compiling and two steps of warm-up come before. Peak memory is above that of the
process before its model was made. Needs the parity extra.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

from benchmarks.environment import environment

LLAMA = {
    "vocab_size": 8192,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
CONTENDERS = ("kvjax kv_only", "torch kv_only", "kvjax all")
RATE = 1e-4


def kvjax_step(directory: str, which: str, tokens: np.ndarray) -> Callable[[], float]:
    """A function that takes one step and returns its loss."""
    import jax
    import jax.numpy as jnp

    import kvjax
    from train.finetune.setup import partition, trainable_paths
    from train.finetune.step import TuneStep, adamw, compile_step

    model, params = kvjax.load(directory, dtype="float32")
    trainable, frozen = partition(params, trainable_paths(model, params, (which,)))
    step = TuneStep(model, adamw(0.9, 0.999, 0.0, 1.0), dtype="float32")
    state = step.init(trainable)
    del params, trainable
    shape = tokens[:, :-1].shape
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        "segment_ids": np.ones(shape, np.int32),
        "weights": np.ones(shape, np.float32),
    }
    batch = jax.tree.map(jnp.asarray, batch)
    rate = jnp.float32(RATE)
    run = compile_step(step, state, frozen, batch, rate).call

    def take() -> float:
        nonlocal state
        state, metrics = run(state, frozen, batch, rate, None)
        return float(metrics["loss"])

    return take


def torch_step(directory: str, tokens: np.ndarray, threads: int) -> Callable[[], float]:
    """The same step with transformers' model."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="sdpa"
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".k_proj." in name or ".v_proj." in name)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    ids = torch.tensor(tokens, dtype=torch.long)

    def take() -> float:
        logits = model(ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return take


def contend(name: str, directory: str, batch: int, length: int, threads: int) -> None:
    """A contender's process: a step for every line it reads."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    tokens = np.random.default_rng(0).integers(0, LLAMA["vocab_size"], (batch, length + 1))
    tokens = tokens.astype(np.int32)
    library, which = name.split()
    if library == "torch":
        import torch  # noqa: F401
        import transformers.models.llama.modeling_llama  # noqa: F401
    else:
        import jax

        import train.finetune.step  # noqa: F401

        jax.devices()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    if library == "torch":
        take = torch_step(directory, tokens, threads)
    else:
        take = kvjax_step(directory, which, tokens)
    losses = [take(), take()]
    report({"ready": time.monotonic() - started})
    for _ in sys.stdin:
        cpu, wall = time.process_time(), time.monotonic()
        losses.append(take())
        report({"seconds": time.monotonic() - wall, "cpu": time.process_time() - cpu})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report({"losses": losses, "peak_bytes": (peak - before) * 1024})


def report(content: dict[str, Any]) -> None:
    """One line for the process that asks."""
    print(json.dumps(content), flush=True)


def race(directory: str, batch: int, length: int, threads: int, repeats: int) -> list[dict]:
    """One row for each contender."""
    sizes = [str(batch), str(length), str(threads)]
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-m", "benchmarks.train_step", "--contend", name, directory, *sizes],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in CONTENDERS
    }

    def read(name: str) -> dict[str, Any]:
        stdout: Any = processes[name].stdout
        return json.loads(stdout.readline())

    ready = {name: read(name)["ready"] for name in CONTENDERS}
    times: dict[str, list[dict]] = {name: [] for name in CONTENDERS}
    for _ in range(repeats):
        for name in CONTENDERS:
            stdin: Any = processes[name].stdin
            stdin.write("step\n")
            stdin.flush()
            times[name].append(read(name))
    rows = []
    for name, process in processes.items():
        stdin = process.stdin
        assert stdin is not None
        stdin.close()
        last = read(name)
        process.wait()
        seconds = statistics.median(found["seconds"] for found in times[name])
        rows.append(
            {
                "contender": name,
                "tokens_per_s": round(batch * length / seconds, 1),
                "seconds": [round(found["seconds"], 4) for found in times[name]],
                "cpu_seconds": round(statistics.median(f["cpu"] for f in times[name]), 4),
                "peak_bytes": last["peak_bytes"],
                "ready_seconds": round(ready[name], 1),
                "losses": [round(loss, 4) for loss in last["losses"]],
            }
        )
    return rows


def write_checkpoint(directory: str) -> None:
    """A random llama, written by transformers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(directory)


def main() -> None:
    if sys.argv[1:2] == ["--contend"]:
        name, directory, *sizes = sys.argv[2:]
        contend(name, directory, *map(int, sizes))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/train_step.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(folder)
        rows = race(folder, args.batch, args.length, args.threads, args.repeats)
    base = rows[0]["tokens_per_s"]
    for row in rows:
        row["kvjax_kv_only_over_it"] = round(base / row["tokens_per_s"], 2)
    result = {
        **environment("benchmarks.train_step", ("jax", "torch", "transformers")),
        "model": LLAMA,
        "batch": args.batch,
        "length": args.length,
        "threads": args.threads,
        "rows": rows,
    }
    print(json.dumps(rows, indent=1))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
