"""Perplexity and logits of a converted checkpoint here and, exported, in stock transformers.

    python -m benchmarks.export CHECKPOINT_DIR --kv-rank 24 --rope-dim 8

CHECKPOINT_DIR holds a grouped-query model, calibration.npy and heldout.npy, token ids [S, T].
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import kvjax
import kvjax.hf

BATCH = 16
Logits = Callable[[np.ndarray], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--kv-rank", type=int, required=True)
    parser.add_argument("--rope-dim", type=int, required=True)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    calibration = np.load(args.checkpoint / "calibration.npy").astype(np.int32)
    heldout = np.load(args.checkpoint / "heldout.npy").astype(np.int32)
    batches = [calibration[i : i + BATCH] for i in range(0, len(calibration), BATCH)]
    model, params = kvjax.load(args.checkpoint, dtype="float32")
    stats = kvjax.transmla.calibrate(model, params, batches)
    best = kvjax.transmla.BEST
    unbiased = dataclasses.replace(best, centred=False, refit=False)
    cases = [
        ("neutral, evenly spaced", best, True, "neutral"),
        ("neutral, free placement", best, False, "neutral"),
        ("rms", unbiased, True, "rms"),
    ]
    rows = []
    for name, recipe, exportable, norm in cases:
        options = {"kv_rank": args.kv_rank, "rope_dim": args.rope_dim, "recipe": recipe}
        new, values = kvjax.transmla.convert(
            model, params, method="decoupled", stats=stats, exportable=exportable, **options
        )
        rows.append({"export": name, **compare(new, values, norm, batches, heldout)})
        print(json.dumps(rows[-1]), flush=True)
    if args.out is not None:
        args.out.write_text(
            json.dumps({"arguments": vars(args), "rows": rows}, default=str, indent=1)
        )


def compare(
    model: kvjax.Transformer, params: Any, norm: str, batches: list, heldout: np.ndarray
) -> dict[str, Any]:
    """One exported model against itself before the export."""
    apply = jax.jit(model.apply)
    ours = [np.asarray(apply({"params": params}, rows)[0]) for rows in _parts(heldout)]
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "out"
        rms = kvjax.hf.latent_rms(model, params, batches) if norm == "rms" else None
        kvjax.save(model, params, out, layout="deepseek_v3", norm=norm, latent_rms=rms)
        raw = json.loads((out / "config.json").read_text())
        stock = stock_logits(out)
        theirs = [stock(rows) for rows in _parts(heldout)]
    error = max(np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True))
    return {
        "kv_lora_rank": raw["kv_lora_rank"],
        "qk_rope_head_dim": raw["qk_rope_head_dim"],
        "perplexity": perplexity(ours, heldout),
        "perplexity in transformers": perplexity(theirs, heldout),
        "relative logit error": float(error / max(np.abs(a).max() for a in ours)),
    }


def stock_logits(directory: Path) -> Logits:
    """Logits of transformers' own class."""
    import torch
    from transformers import DeepseekV3ForCausalLM

    model = DeepseekV3ForCausalLM.from_pretrained(directory).eval()

    def logits(rows: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor(rows)).logits.float().numpy()

    return logits


def perplexity(logits: list[np.ndarray], tokens: np.ndarray) -> float:
    """exp of the mean over all next-token predictions."""
    losses = [
        jax.nn.logsumexp(scores[:, :-1], axis=-1)
        - np.take_along_axis(scores[:, :-1], rows[:, 1:, None], axis=-1)[..., 0]
        for scores, rows in zip(logits, _parts(tokens), strict=True)
    ]
    return float(np.exp(np.mean(np.concatenate([np.asarray(loss) for loss in losses]))))


def _parts(rows: np.ndarray) -> list[np.ndarray]:
    return [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]


if __name__ == "__main__":
    main()
