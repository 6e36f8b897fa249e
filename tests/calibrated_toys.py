"""A tiny random model of every family with its calibration, shared by the tests of conversions."""

import functools

import jax
import numpy as np
from tiny_checkpoints import CASES, COMMON
from toys import random_params

from kvjax.hf import config_from_hf
from kvjax.nn import Transformer
from kvjax.transmla import calibrate

T = 24


@functools.cache
def build(name):
    """Model, parameters, their calibration, test tokens, and the logits of these.

    The test tokens have the shape of the calibration, so that both run the same programs.
    """
    config = config_from_hf({**COMMON, **CASES[name], "max_position_embeddings": 96})
    model = Transformer(config)
    params = random_params(model)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, config.vocab_size, (8, T)).astype(np.int32)
    stats = calibrate(model, params, [ids])
    tokens = rng.integers(0, config.vocab_size, (8, T)).astype(np.int32)
    return model, params, stats, tokens, forward(model, params, tokens)


def forward(model, params, tokens):
    return np.asarray(model.apply({"params": params}, jax.device_put(tokens))[0])


def error(got, want):
    return np.abs(got - want).max() / np.abs(want).max()


def whole(model):
    """Sizes that cut nothing: kv_rank and rope_dim of every layer."""
    bases = [layer.attention for layer in model.config.layers]
    ropes = [b.num_kv_heads * b.rope.dim if b.rope else 0 for b in bases]
    ranks = [2 * b.num_kv_heads * b.head_dim - rope for b, rope in zip(bases, ropes, strict=True)]
    return {"kv_rank": ranks, "rope_dim": ropes}


def loss(model, params, tokens):
    """Mean negative log-likelihood of every next token, in float64."""
    logits = forward(model, params, tokens)[:, :-1].astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1).mean()
