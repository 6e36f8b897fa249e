"""What a checkpoint is, without loading it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kvjax.hf import layout_of, read_model, stored_tensors
from kvjax.hf.source import missing_weights, on_hub, resolve
from kvjax.nn import Transformer
from kvjax.pipelines.convert import bytes_per_token
from kvjax.sharding import param_shapes


def describe(path: str) -> dict[str, Any]:
    """Family, shapes, parameters and KV cache bytes, from the config and the file headers.

    Weights that are on the hub alone are not downloaded: their dtype is what the config says.

    Raises:
        ValueError: no such model, or files that don't fit together.
    """
    directory = resolve(path)
    model, layout = read_model(directory), layout_of(directory)
    config = model.config
    dtypes = _dtypes(model, directory, on_hub(path)) if layout == "hf" else []
    shapes = jax.tree.leaves(param_shapes(model))
    per_token = bytes_per_token(model, "bfloat16")
    return {
        "family": config.model_type,
        "layers": config.num_layers,
        "hidden size": config.hidden_size,
        "attention": ", ".join(sorted({describe_attention(a.attention) for a in config.layers})),
        "vocabulary": config.vocab_size,
        "context": config.context_length,
        "parameters": sum(leaf.size for leaf in shapes),
        "layout": ", ".join([layout, *dtypes]),
        "cache bytes a token (bfloat16)": per_token,
        "cache bytes at full context": per_token * config.context_length,
    }


def _dtypes(model: Transformer, directory: Path, on_hub: bool) -> list[str]:
    """Of the weights, by their files' headers; or of the config, where the hub has the weights."""
    if not on_hub or not missing_weights(directory):
        return sorted({tensor.dtype.name for tensor in stored_tensors(directory).values()})
    raw = json.loads(model.config.hf_json)
    said = raw.get("dtype") or raw.get("torch_dtype")
    return [f"{said} by its config, weights not downloaded" if said else "weights not downloaded"]


def describe_attention(attention: Any) -> str:
    """The kind of attention and its heads, e.g. "GQA 32/8 × 128"."""
    base = getattr(attention, "base", attention)
    kind = type(attention).__name__.removesuffix("Config")
    if not hasattr(base, "num_kv_heads"):
        return f"{kind} {base.num_heads}, latent {base.kv_lora_rank} + {base.qk_rope_head_dim}"
    window = f", window {base.window}" if base.window else ""
    return f"{kind} {base.num_heads}/{base.num_kv_heads} × {base.head_dim}{window}"


def tensor_statistics(path: str, patterns: Sequence[str]) -> list[dict[str, Any]]:
    """Shape, dtype, mean, standard deviation and largest magnitude of the named tensors.

    Args:
        patterns: names, or shell patterns such as "model.layers.0.*".

    Raises:
        ValueError: a pattern that matches nothing, or tensors that hold NaN or infinity: all of
            them are named.
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
                "dtype": stored[name].dtype.name,
                "mean": f"{values.mean():.3g}",
                "std": f"{values.std():.3g}",
                "max |x|": f"{np.abs(values).max(initial=0.0):.3g}",
            }
        )
    if broken:
        raise ValueError(f"{path} has NaN or infinite values in {'; '.join(broken)}")
    return rows
