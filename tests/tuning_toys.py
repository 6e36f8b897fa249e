"""Tiny models of every attention, and random packed batches, for the tests of fine-tuning."""

import dataclasses
import functools
import shutil
from pathlib import Path

import jax
import numpy as np
from calibrated_toys import build
from toys import random_params

import kvjax
from kvjax import transmla
from kvjax.config import GQAConfig, LayerConfig, MLPConfig, ModelConfig, NormConfig, RopeConfig
from kvjax.hf import read_model
from kvjax.nn import Transformer
from kvjax.tasks import WordVocabulary
from train.pretrain.curriculum import ModelShape, model_config

KINDS = ("gqa", "equal_cache", "fold", "post")


@functools.cache
def toy(kind):
    """A model with one kind of attention, and its parameters."""
    if kind == "post":
        model, params, stats, *_ = build("qwen3")
    else:
        model, params, stats, *_ = build("llama")
    if kind == "gqa":
        return model, params
    if kind == "equal_cache":
        return transmla.convert(model, params, init="svd_global")
    sizes = {"kv_rank": 12, "rope_dim": 4, "mode": kind}
    closed = dataclasses.replace(transmla.BEST, refit=False)  # the refit takes long to compile
    return transmla.convert(model, params, "decoupled", stats=stats, recipe=closed, **sizes)


def packed_batch(vocab_size, B=4, T=24, seed=0):
    """Two or three documents a row, then padding; about half of the targets are learned."""
    rng = np.random.default_rng(seed)
    batch = {
        "tokens": np.zeros((B, T), np.int32),
        "targets": np.zeros((B, T), np.int32),
        "positions": np.full((B, T), -1, np.int32),
        "segment_ids": np.zeros((B, T), np.int32),
        "weights": np.zeros((B, T), np.float32),
    }
    for row in range(B):
        at = 0
        for segment, length in enumerate((9, 7, 5)[: 2 + row % 2], start=1):
            ids = rng.integers(0, vocab_size, length + 1)
            here = slice(at, at + length)
            batch["tokens"][row, here], batch["targets"][row, here] = ids[:-1], ids[1:]
            batch["positions"][row, here] = np.arange(length)
            batch["segment_ids"][row, here] = segment
            batch["weights"][row, here] = rng.random(length) < 0.5
            at += length
    return jax.device_put(batch)


def wide_model(vocab_size=64, layers=2, width=8192):
    """Weights that are large beside activations, so that a buffer for a frozen one would show."""
    attention = GQAConfig(4, 2, 16, 0.25, RopeConfig(16), norm=NormConfig())
    layer = LayerConfig(attention, MLPConfig(width))
    model = Transformer(ModelConfig("llama", vocab_size, 64, (layer,) * layers))
    return model, random_params(model)


def tiny_checkpoint(out):
    """Writes a tiny random llama with the project's vocabulary and tokenizer; what was written."""
    vocab = WordVocabulary()
    shape = ModelShape(16, 2, 4, 2, 8, 32, 128)
    model = Transformer(model_config(shape, vocab.size, vocab.bos_id, vocab.eos_id))
    params = random_params(model)
    kvjax.save(model, params, out, layout="hf")
    for path in Path(read_model("builtin:needle").config.source).glob("tokenizer*"):
        shutil.copy(path, out)
    return model, params
