"""Logits and perplexity of converted models here and, exported, in stock transformers; fp32.

    python -m benchmarks.export CHECKPOINT_DIR --kv-rank 24 --rope-dim 8 --out FILE

CHECKPOINT_DIR holds a grouped-query model, calibration.npy and heldout.npy, token ids [S, T]. The
other rows are random models of two layers, one for each family and RoPE.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kvjax
from benchmarks.environment import environment
from kvjax.hf import config_from_hf, latent_rms
from kvjax.paths import local_path

BATCH = 16
Logits = Callable[[np.ndarray], np.ndarray]
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 67,
    "max_position_embeddings": 64,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
FAMILIES: dict[str, tuple[dict[str, Any], bool]] = {
    "llama, default RoPE": ({"model_type": "llama"}, True),
    "llama, llama3 RoPE": (
        {"model_type": "llama", "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 16}},
        True,
    ),
    "llama, YaRN": ({"model_type": "llama", "rope_scaling": YARN}, True),
    "llama, free placement": ({"model_type": "llama"}, False),
    "mistral without a window": ({"model_type": "mistral", "sliding_window": None}, True),
    "qwen2": ({"model_type": "qwen2"}, True),
    "phi3": ({"model_type": "phi3"}, True),
    "smollm3 with RoPE in all layers": (
        {"model_type": "smollm3", "no_rope_layers": [1, 1]},
        True,
    ),
}
"""Name → config.json beyond TINY, and whether the frequencies are evenly spaced."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", type=local_path)
    parser.add_argument("--kv-rank", type=int, required=True)
    parser.add_argument("--rope-dim", type=int, required=True)
    parser.add_argument("--out", type=local_path)
    args = parser.parse_args()
    rows = [*families(), *checkpoint(args.checkpoint, args.kv_rank, args.rope_dim)]
    for row in rows:
        print(json.dumps(row), flush=True)
    if args.out is not None:
        where = environment("benchmarks.export", ("jax", "torch", "transformers"))
        args.out.write_text(json.dumps({**where, "rows": rows}, indent=1) + "\n")


def families() -> Iterator[dict[str, Any]]:
    """Random models of each family that exports."""
    rng = np.random.default_rng(0)
    batches = [rng.integers(3, TINY["vocab_size"], (8, 64)).astype(np.int32) for _ in range(2)]
    for name, (raw, exportable) in FAMILIES.items():
        model = kvjax.Transformer(config_from_hf({**TINY, **raw}))
        params = model.init(jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
        params = jax.tree.map(lambda x: _moved(x, rng), params)
        stats = kvjax.transmla.calibrate(model, params, batches)
        new = kvjax.transmla.convert(
            model, params, method="decoupled", stats=stats, kv_rank=20, rope_dim=4,
            exportable=exportable,
        )  # fmt: skip
        yield {"model": name, **compare(*new, "neutral", batches, batches[0])}


def _moved(x: jax.Array, rng: np.random.Generator) -> jax.Array:
    """Norms and biases start as the identity; away from it, each of them shows."""
    return x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype)


def checkpoint(path: Path, kv_rank: int, rope_dim: int) -> Iterator[dict[str, Any]]:
    """A real model in both forms."""
    calibration = np.load(path / "calibration.npy").astype(np.int32)
    heldout = np.load(path / "heldout.npy").astype(np.int32)
    batches = [calibration[i : i + BATCH] for i in range(0, len(calibration), BATCH)]
    model, params = kvjax.load(path, dtype="float32")
    stats = kvjax.transmla.calibrate(model, params, batches)
    best = kvjax.transmla.BEST
    unbiased = kvjax.transmla.UNBIASED
    cases = [
        ("neutral, evenly spaced", best, True, "neutral"),
        ("neutral, free placement", best, False, "neutral"),
        ("rms, evenly spaced, unbiased recipe", unbiased, True, "rms"),
    ]
    for name, recipe, exportable, norm in cases:
        options = {"kv_rank": kv_rank, "rope_dim": rope_dim, "recipe": recipe}
        new = kvjax.transmla.convert(
            model, params, method="decoupled", stats=stats, exportable=exportable, **options
        )
        yield {"model": f"{path.name}: {name}", **compare(*new, norm, batches, heldout)}


def compare(
    model: kvjax.Transformer, params: Any, norm: str, batches: list, heldout: np.ndarray
) -> dict[str, Any]:
    """One exported model against itself before the export."""
    apply = jax.jit(model.apply)
    ours = [np.asarray(apply({"params": params}, rows)[0]) for rows in _parts(heldout)]
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "out"
        rms = latent_rms(model, params, batches) if norm == "rms" else None
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
