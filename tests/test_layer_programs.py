"""Layers of a kind share their programs: a deeper model compiles no other layers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from compilations import counted
from toys import random_params

from kvjax.config import GQAConfig, LayerConfig, MLPConfig, ModelConfig, RopeConfig
from kvjax.example import Example
from kvjax.headkv.measure import score_examples
from kvjax.nn import Transformer
from kvjax.tasks import perplexity
from kvjax.transmla import calibrate, convert
from kvjax.transmla.distill import distill
from train.finetune.step import TuneStep, adamw, flatten

VOCAB, T = 53, 24
GQA = GQAConfig(4, 2, 8, 8**-0.5, RopeConfig(8))
TEXT = np.random.default_rng(0).integers(0, VOCAB, (16, T)).astype(np.int32)
LAYERS = ("_moments", "_observe", "_solve", "_group", "_products", "_step", "apply_block")
LAYERS = {
    f"jit({name})" for name in (*LAYERS, "attention_output", "packed_block", "layer_importance")
}
"""The programs that a layer goes through."""


def everything(depth):
    """Calibrates, converts, scores and evaluates a model; the programs of each step."""
    layers = (LayerConfig(GQA, MLPConfig(24)),) * depth
    model = Transformer(ModelConfig("llama", vocab_size=VOCAB, hidden_size=32, layers=layers))
    params, found = random_params(model), {}
    # The last layer's keys have nothing in the fastest component, which others go on rotating.
    last = params[f"layers_{depth - 1}"]["attn"]
    last["k"] = last["k"].at[:, :, np.array([0, 4])].multiply(1e-3)
    with counted() as found["calibrate"]:
        stats = calibrate(model, params, [TEXT])
    with counted() as found["equal_cache"]:
        convert(model, params, "equal_cache")
    with counted() as found["decoupled"]:
        converted, new = convert(model, params, "decoupled", stats=stats, kv_rank=12, rope_dim=8)
    with counted() as found["distill"]:
        distill(model, params, converted, new, stats, steps=2)
    ids = TEXT.tolist()
    examples = [Example(tuple(row[:20]), tuple(row[20:]), (3, 7)) for row in ids[:2]]
    with counted() as found["score_heads"]:
        score_examples(converted, new, examples, "copying", batch_size=2)
    with counted() as found["perplexity"]:
        perplexity(converted, new, [TEXT])
    numbers = {name: jnp.zeros((2, T), jnp.int32) for name in ("segment_ids", "targets")}
    batch = numbers | {"tokens": jnp.asarray(TEXT[:2]), "weights": jnp.ones((2, T))}
    batch["positions"] = jnp.tile(jnp.arange(T, dtype=jnp.int32)[None], (2, 1))
    step = TuneStep(converted, adamw(0.9, 0.999, 0.0, 1.0), "float32")
    with counted() as found["train"]:
        step.losses({}, flatten(new), batch)
    return converted, {name: programs.compiled for name, programs in found.items()}


def test_a_deeper_model_compiles_no_other_layers():
    jax.clear_caches()
    (_, shallow), (converted, deep) = everything(2), everything(6)
    # Layers have frequencies of their own, which are an argument of the programs.
    assert len({layer.attention.rope for layer in converted.config.layers}) > 1
    assert set(itertools.chain(*shallow.values())) > LAYERS
    # Every call of `distill` has an optimizer of its own, and so one program for its steps.
    again = [name for names in deep.values() for name in names if name in LAYERS]
    assert again == ["jit(_step)"]
