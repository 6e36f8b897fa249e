"""`kvjax info` and `kvjax export`: the facts of a checkpoint, and a checkpoint in another layout.

At the end are the measures that reports of conversions and exports share: cache bytes per token and
the largest change of a logit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.checkpoint_files import MAX_SHARD_BYTES
from kvjax.checks import OVERFLOW, Range, check_finite, check_params, check_ranges, first_not_finite
from kvjax.commands import unfinished
from kvjax.commands.text import token_rows
from kvjax.config import AttentionConfig, ModelConfig
from kvjax.endings import say_finished
from kvjax.folders import MADE, PART, made, record_made
from kvjax.hf import (
    check_export,
    default_dtype,
    latent_rms,
    layout_of,
    load,
    read_model,
    stored_tensors,
)
from kvjax.hf.save import saving, write_model
from kvjax.hf.source import gguf_file, missing_weights, on_hub, resolve
from kvjax.identity import array_digest
from kvjax.nn import Transformer, param_shapes
from kvjax.progress import stage
from kvjax.text_files import read_object

SEQUENCE, BATCH = 256, 8
"""Tokens per sequence, and sequences at a time, of a calibration for an export."""
PROBE_TOKENS = 64
"""Random tokens on which the logits of two models are compared."""
LAYOUT = "deepseek_v3"
SHARD = Range(least=1, whole=True)


def describe(path: str) -> dict[str, Any]:
    """Family, shapes, parameters and KV cache bytes, from the config and the file headers.

    Weights that are only on the hub are not downloaded. Their dtype then comes from the config.

    Raises:
        ValueError: no such model, or files that do not fit together.
    """
    directory = resolve(path)
    model, layout = read_model(directory), layout_of(directory)
    config = model.config
    dtypes = [] if layout == "native" else _dtypes(model, directory, on_hub(path))
    per_token = bytes_per_token(model, "bfloat16")
    return {
        "family": config.model_type,
        "layers": config.num_layers,
        "hidden size": config.hidden_size,
        "attention": ", ".join(sorted({describe_attention(a.attention) for a in config.layers})),
        "vocabulary": config.vocab_size,
        "context": config.context_length,
        "parameters": count_parameters(param_shapes(model.config)),
        "layout": ", ".join([layout, *dtypes]),
        "cache bytes a token (bfloat16)": per_token,
        "cache bytes at full context": per_token * config.context_length,
    }


def _dtypes(model: Transformer, directory: Path, on_hub: bool) -> list[str]:
    """The weights' dtypes: from the file headers, or from the config if only the hub has files."""
    if not on_hub or gguf_file(directory) or not missing_weights(directory):
        return sorted({tensor.stored_as for tensor in stored_tensors(directory).values()})
    raw = json.loads(model.config.hf_json)
    said = raw.get("dtype") or raw.get("torch_dtype")
    return [f"{said} by its config, weights not downloaded" if said else "weights not downloaded"]


def describe_attention(attention: AttentionConfig) -> str:
    """The kind of attention and its heads, such as "GQA 32/8 × 128"."""
    base, kind = attention.unconverted, type(attention).__name__.removesuffix("Config")
    if base.shared_latent:
        latent, rope = base.cached_widths
        return f"{kind} {base.query_heads}, latent {latent} + {rope}"
    window = f", window {base.window}" if base.window else ""
    return f"{kind} {base.query_heads}/{base.cached_heads} × {base.cached_widths[0]}{window}"


def tensor_statistics(path: str, patterns: Sequence[str]) -> list[dict[str, Any]]:
    """Shape, dtype, mean, standard deviation and largest magnitude of the named tensors.

    Args:
        patterns: names, or shell patterns such as "model.layers.0.*".

    Raises:
        ValueError: a pattern that matches nothing; or tensors that hold NaN or infinity, all of
            which are named.
    """
    stored = stored_tensors(path)
    unmatched = [p for p in patterns if not any(fnmatchcase(name, p) for name in stored)]
    if unmatched:
        raise ValueError(f"no tensor is called {', '.join(unmatched)}; got {len(stored)} tensors")
    names = [name for name in sorted(stored) if any(fnmatchcase(name, p) for p in patterns)]
    rows, broken = [], []
    for name in names:
        values = np.asarray(stored[name].open(), np.float32)
        bad = int(values.size - np.isfinite(values).sum())
        if bad:
            broken.append(f"{name} ({bad} of {values.size})")
            continue
        rows.append(
            {
                "tensor": name,
                "shape": "×".join(map(str, values.shape)),
                "dtype": stored[name].stored_as,
                "mean": f"{values.mean():.3g}",
                "std": f"{values.std():.3g}",
                "max |x|": f"{np.abs(values).max(initial=0.0):.3g}",
            }
        )
    if broken:
        raise ValueError(f"{path} has NaN or infinite values in {'; '.join(broken)}")
    return rows


def export_checkpoint(
    source: str,
    out: Path,
    norm: str,
    calibration: Path | None,
    calibration_tokens: int,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, Any]:
    """Writes the converted model at `source` to `out` in the deepseek_v3 layout.

    The directory is whole or absent. The same call again returns the report that it holds.

    Args:
        norm: "neutral", or "rms", which needs `calibration`.
        calibration: a text file, or token ids [S, T] in a .npy file.
        calibration_tokens: most tokens of `calibration` to use.
        dtype: of the weights; None: see `kvjax.hf.default_dtype`.
        max_shard_bytes: largest file of weights, see `kvjax.save`.

    Returns:
        The sizes that a loader sees, cache bytes per token before and after, the features that the
        checkpoint requires of a loader, the largest change of a logit on random tokens relative to
        the largest logit, and the findings of `kvjax.hf.check_export`.

    Raises:
        ValueError: `out` is not empty, or holds an export with other settings; the layout cannot
            express the model; the model holds NaN; the calibration is missing; or the written files
            are incomplete.
    """
    # Refuse bad input before anything is written.
    check_ranges({"max_shard_bytes": max_shard_bytes}, {"max_shard_bytes": SHARD})
    present = {path.name for path in out.iterdir()} if out.exists() else set()
    if present and not present & {PART, MADE}:
        raise ValueError(f"{out} is not empty, expected a new directory")
    dtype, rows = dtype or default_dtype(), None
    if norm == "rms":
        if calibration is None:
            raise ValueError("norm='rms' needs a calibration text: --calibration FILE")
        rows = token_rows(source, calibration, calibration_tokens, SEQUENCE)
    with stage(f"loading {source}"):
        model, params = load(source, dtype=dtype)
    check_params(params)
    text = None if rows is None else array_digest(rows)
    wanted = {"norm": norm, "text": text, "max_shard_bytes": max_shard_bytes}
    request = {"layout": LAYOUT, **wanted, **unfinished.describe(model, params, dtype)}
    if (earlier := made(out, request)) is not None:
        say_finished(out)
        return earlier
    # The weights of the norm make up for the size of the latents, which calibration measures.
    weights = None
    if rows is not None:
        weights = latent_rms(
            model, params, [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
        )
        check_finite([np.asarray(w) for w in weights], "rms of the latents of layer ")
    # Write the checkpoint, then load it again and compare: a report describes the files themselves.
    with saving(params, out, LAYOUT) as part:
        rest = {"norm": norm, "latent_rms": weights}
        write_model(model, params, part, LAYOUT, max_shard_bytes, **rest)
        checked = check_export(part, source=model.config.source)
        new_model, new_params = load(part, dtype=dtype)
        raw = read_object(part / "config.json")
        report = {
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
        record_made(part, request, report)
    return report


def bytes_per_token(model: Transformer, dtype: str) -> int:
    """Cache bytes that one more token of one sequence costs, over all layers.

    Args:
        dtype: of the cache.
    """

    def total(length: int) -> int:
        cache = jax.eval_shape(lambda: model.init_cache(1, length, dtype))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))

    return total(2) - total(1)


def count_parameters(params: Any) -> int:
    """Number of parameters in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def logit_change(model: Transformer, params: Any, new_model: Transformer, new_params: Any) -> float:
    """max |new − old| / max |old| over the logits of random tokens.

    Raises:
        ValueError: logits that are not finite.
    """
    tokens = jnp.asarray(probe_tokens(model.config))
    models = (model, params), (new_model, new_params)
    return relative_change(*(m.apply({"params": p}, tokens)[0] for m, p in models))


def relative_change(old: jax.Array, new: jax.Array) -> float:
    """max |new − old| / max |old|.

    Raises:
        ValueError: logits that are not finite.
    """
    for name, logits in (("original", old), ("converted", new)):
        if first_not_finite(logits) is not None:
            raise ValueError(f"the {name} model's logits are NaN or infinite: {OVERFLOW}")
    return float(jnp.max(jnp.abs(new - old)) / jnp.max(jnp.abs(old)))


def probe_tokens(config: ModelConfig) -> np.ndarray:
    """Random tokens [1, T] int32. They depend on the vocabulary and the context length alone."""
    length = min(PROBE_TOKENS, config.context_length)
    return np.random.default_rng(0).integers(0, config.vocab_size, (1, length)).astype(np.int32)
