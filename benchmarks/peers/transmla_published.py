"""The published TransMLA code on given tokens: CPU seconds of a conversion, and perplexity.

    python transmla_published.py TOKENS.json CHECKPOINT OUT.json --code TransMLA/transmla …

Runs in an environment without kvjax; `python -m benchmarks.peers` makes it. CODE is the folder
with partial_rope.py and lora_qkv.py of https://github.com/MuLabPKU/TransMLA. TOKENS has
`calibration` and `test`, lists of sequences of token ids. The steps are those of the authors'
converter.py in float32, with a FreqFold that is given: theirs may search for one on the test text.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


def cpu_seconds() -> float:
    """User and system time of the process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("checkpoint")
    parser.add_argument("out", type=Path)
    parser.add_argument("--code", type=Path, required=True)
    parser.add_argument("--kv-rank", type=int, required=True)
    parser.add_argument("--rope-dim", type=int, required=True)
    parser.add_argument("--fold", type=int, default=4)
    args = parser.parse_args()
    sys.path.insert(0, str(args.code.resolve()))
    tokens = {
        name: torch.tensor(rows) for name, rows in json.loads(args.tokens.read_text()).items()
    }
    model = AutoModelForCausalLM.from_pretrained(
        args.checkpoint, torch_dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    original = perplexity(model, tokens["test"])
    start = cpu_seconds()
    model = convert(model, batches(tokens["calibration"]), args)
    seconds = cpu_seconds() - start
    facts = {
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "kv_rank": args.kv_rank,
        "rope_dim": args.rope_dim,
        "fold": args.fold,
        "original": original,
        "cpu_seconds": round(seconds, 1),
        "perplexity": perplexity(model, tokens["test"]),
    }
    args.out.write_text(json.dumps(facts) + "\n")


def batches(tokens: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """What the authors' loader gives: batches of 8 sequences, with labels."""
    return [
        {"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows}
        for rows in tokens.split(8)
    ]


@torch.no_grad()
def convert(model: Any, loader: list[dict[str, torch.Tensor]], args: argparse.Namespace) -> Any:
    """The authors' two steps; each runs the model on the calibration text first."""
    from lora_qkv import low_rank_qkv  # pyright: ignore[reportMissingImports]
    from partial_rope import partial_rope  # pyright: ignore[reportMissingImports]

    collapse = model.config.head_dim // args.rope_dim
    model = partial_rope(model, None, loader, None, freqfold=args.fold, collapse=collapse)
    return low_rank_qkv(
        model,
        None,
        loader,
        None,
        q_lora_rank=None,
        qk_mqa_dim=args.rope_dim,
        collapse=collapse,
        kv_lora_rank=args.kv_rank,
        use_qkv_norm=False,
        balance_kv_ratio=1,
    )


@torch.no_grad()
def perplexity(model: Any, tokens: torch.Tensor) -> float:
    """exp of the mean loss of all tokens but the first of each sequence."""
    losses = []
    for rows in tokens.split(4):
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1].transpose(1, 2)
        losses.append(torch.nn.functional.cross_entropy(logits, rows[:, 1:], reduction="none"))
    return math.exp(torch.cat(losses).mean())


if __name__ == "__main__":
    main()
