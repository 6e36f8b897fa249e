"""Each prompt gets what it gets alone, whatever stands beside it and whatever is kept."""

import functools

import numpy as np
import pytest
from toys import random_params

from kvjax.config import GQAConfig, LayerConfig, MLAConfig, MLPConfig, ModelConfig, RopeConfig
from kvjax.generation import generate
from kvjax.headkv import HeadScores
from kvjax.nn import Transformer
from kvjax.policies.named import resolve

GQA = GQAConfig(4, 2, 8, 8**-0.5, RopeConfig(8))
SLIDING = GQAConfig(4, 2, 8, 8**-0.5, RopeConfig(8), window=13)
MLA = MLAConfig(4, 16, 8, 8, 12, None, 0.3, RopeConfig(8))
KINDS = {"sliding": (GQA, SLIDING), "mla": (MLA, MLA)}
SCORES = HeadScores(np.random.default_rng(0).random((2, 4, 5)) ** 4)
RANDOM = np.random.default_rng(2)
PROMPTS = [RANDOM.integers(0, 61, n).tolist() for n in (31, 20, 5, 32, 23)]
ALONE, LONGEST = (1, 2, 4), 3
SIZE = "kv_size=12,observed=4"


@functools.cache
def build(kind):
    layers = tuple(LayerConfig(attention, MLPConfig(32)) for attention in KINDS[kind])
    model = Transformer(ModelConfig("llama", 61, 32, layers, max_position_embeddings=256))
    return model, random_params(model)


CASES = [
    ("sliding", "full:entries=int8"),
    ("sliding", "full:entries=int4"),
    ("sliding", f"pyramidkv:{SIZE}"),
    ("sliding", f"knorm:{SIZE},entries=int8"),
    ("sliding", f"h2o:{SIZE}"),
    ("sliding", f"expected:{SIZE}"),
    ("sliding", f"adasnapkv:{SIZE}"),
    ("sliding", f"adasnapkv:{SIZE},compression_interval=6"),
    ("sliding", f"headkv:{SIZE},ring=5"),
    ("sliding", f"headkv:{SIZE},compression_interval=6,entries=int4"),
    ("sliding", "headkv_adaptive:ratio=0.5,observed=4,ring=5"),
    ("mla", f"snapkv:{SIZE}"),
    ("mla", "h2o:ratio=0.5,observed=4,entries=int8"),
]


def answers(kind, policy, prompts):
    model, params = build(kind)
    settings = {"policy": resolve(policy, model.config, SCORES), "eos_ids": ()}
    return generate(model, params, prompts, 20, **settings).tokens


@functools.cache
def together(kind, policy):
    return answers(kind, policy, PROMPTS)


@pytest.mark.parametrize(("kind", "policy"), CASES)
def test_a_batch_gives_each_prompt_what_it_gets_alone(kind, policy):
    """Alone but for copies and the longest prompt: batches of one size share their programs."""
    want = together(kind, policy)
    for index in ALONE:
        got = answers(kind, policy, [PROMPTS[index]] * 4 + [PROMPTS[LONGEST]])
        assert got == [want[index]] * 4 + [want[LONGEST]]


@pytest.mark.parametrize(
    ("kind", "policy"), [("sliding", f"headkv:{SIZE},ring=5"), ("mla", f"snapkv:{SIZE}")]
)
def test_a_batch_of_one(kind, policy):
    for index in ALONE:
        assert answers(kind, policy, [PROMPTS[index]]) == [together(kind, policy)[index]]
