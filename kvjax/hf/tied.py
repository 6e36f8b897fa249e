"""Output matrices of models whose config.json ties them to the embedding."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kvjax.config import ModelConfig
from kvjax.hf.checkpoint import Checkpoint, scan
from kvjax.hf.names import canonical
from kvjax.nn import Transformer

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
PIECE_BYTES = 4 << 20


def as_stored(config: ModelConfig, directory: Path) -> ModelConfig:
    """The config, untied where the checkpoint holds an output matrix of its own.

    transformers does the same. The config.json that a later save writes says so too.
    """
    return _untied(config) if config.tie_embeddings and _differ(directory) else config


def matching(model: Transformer, params: Mapping[str, Any]) -> Transformer:
    """The model, untied where its parameters have an output matrix of their own.

    For a model that was read when its weights were not there yet to be compared.
    """
    if not model.config.tie_embeddings or "lm_head" not in params:
        return model
    return Transformer(_untied(model.config))


def _untied(config: ModelConfig) -> ModelConfig:
    raw = json.loads(config.hf_json) | {"tie_word_embeddings": False}
    text = json.dumps(raw, indent=2) + "\n"
    return dataclasses.replace(config, tie_embeddings=False, hf_json=text)


def embedding_from_head(checkpoint: Checkpoint) -> Checkpoint:
    """A tied checkpoint that holds only the output matrix, under the name of the embedding."""
    held = checkpoint.tensors
    if HEAD not in held or EMBEDDING in held or EMBEDDING in checkpoint.lost:
        return checkpoint
    return checkpoint.renamed(lambda name: EMBEDDING if name == HEAD else name)


def _differ(directory: Path) -> bool:
    """Whether a checkpoint holds both matrices, with different numbers; only these are read."""
    try:
        found = scan(directory)
    except ValueError:  # no weights, or damaged ones: whoever loads them says so
        return False
    found = found.renamed(functools.partial(canonical, expected={EMBEDDING, HEAD}))
    if not {EMBEDDING, HEAD} <= found.tensors.keys():
        return False
    a, b = found.open(EMBEDDING), found.open(HEAD)
    if a.shape != b.shape or a.ndim == 0:
        return True
    rows = max(1, PIECE_BYTES // max(1, a[:1].nbytes))
    for start in range(0, len(a), rows):
        if not _equal(a[start : start + rows], b[start : start + rows]):
            return True
        found.release()
    return False


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays hold the same numbers, in whatever dtypes."""
    if a.dtype == b.dtype and np.array_equal(a.view(np.uint8), b.view(np.uint8)):
        return True
    return np.array_equal(a.astype(np.float64), b.astype(np.float64))
