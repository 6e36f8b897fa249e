"""Converted checkpoint in, a checkpoint that transformers loads out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.checks import Range, check_finite, check_params, check_ranges
from kvjax.hf import check_export, latent_rms, load, save
from kvjax.hf.safetensors import MAX_SHARD_BYTES
from kvjax.pipelines.calibration_text import token_rows
from kvjax.pipelines.companions import bytes_per_token
from kvjax.pipelines.convert import logit_change

SEQUENCE = 256  # calibration tokens in a row
BATCH = 8
SHARD = Range(least=1, whole=True)


def export_checkpoint(
    source: str,
    out: Path,
    norm: str,
    calibration: Path | None,
    calibration_tokens: int,
    dtype: str,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, Any]:
    """Writes the converted model at `source` to `out` in the deepseek_v3 layout.

    Args:
        norm: "neutral", or "rms", which needs `calibration`: token ids [S, T] in a .npy file, or a
            text file.
        max_shard_bytes: as of `kvjax.save`.

    Returns:
        The sizes that a loader sees, cache bytes a token before and after, what the checkpoint
        requires of a loader, the largest change of a logit on random tokens, relative to the
        largest logit, and what `kvjax.hf.check_export` says of the files.

    Raises:
        ValueError: `out` is not empty, a model that the layout cannot express or that holds NaN,
            no calibration, or what was written is not whole.
    """
    check_ranges({"max_shard_bytes": max_shard_bytes}, {"max_shard_bytes": SHARD})
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty, expected a new directory")
    model, params = load(source, dtype=dtype)
    check_params(params)
    weights = None
    if norm == "rms":
        if calibration is None:
            raise ValueError("norm='rms' needs a calibration text: --calibration FILE")
        rows = token_rows(source, calibration, calibration_tokens, SEQUENCE)
        weights = latent_rms(
            model, params, [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
        )
        check_finite([np.asarray(w) for w in weights], "rms of the latents of layer ")
    settings = {"norm": norm, "latent_rms": weights, "max_shard_bytes": max_shard_bytes}
    save(model, params, out, layout="deepseek_v3", **settings)
    checked = check_export(out, source=model.config.source)
    new_model, new_params = load(out, dtype=dtype)
    raw = json.loads((out / "config.json").read_text(encoding="utf-8"))
    return {
        "norm": norm,
        "kv_lora_rank": raw["kv_lora_rank"],
        "qk_rope_head_dim": raw["qk_rope_head_dim"],
        "rope_type": raw["rope_parameters"]["rope_type"],
        "bytes_per_token_before": bytes_per_token(model, dtype),
        "bytes_per_token_after": bytes_per_token(new_model, dtype),
        "relative_logit_change": logit_change(model, params, new_model, new_params),
        "requires": raw.get("kvjax_requires", []),
        **checked,
    }
