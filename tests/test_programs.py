"""Programs are compiled once: budgets, lengths and numbers of tokens are data of the same ones."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from compilations import counted
from toys import random_params

from kvjax.config import (
    DecoupledConfig,
    GQAConfig,
    LayerConfig,
    MLPConfig,
    ModelConfig,
    RopeConfig,
    SelectedPairs,
)
from kvjax.generation import generate
from kvjax.headkv import HeadScores
from kvjax.nn import Transformer
from kvjax.policies.named import resolve

GQA = GQAConfig(4, 2, 8, 8**-0.5, RopeConfig(8))
SNAPKV = "snapkv:kv_size=20"


def build(*attention):
    layers = tuple(LayerConfig(each, MLPConfig(32)) for each in attention)
    model = Transformer(ModelConfig("llama", 61, 32, layers, max_position_embeddings=256))
    return model, random_params(model)


def run(model, params, policy, lengths=(40, 33), new=8):
    """Generates for prompts of these lengths."""
    rng = np.random.default_rng(sum(lengths))
    prompts = [rng.integers(0, 61, n).tolist() for n in lengths]
    scores = HeadScores(np.random.default_rng(0).random((model.config.num_layers, 4, 3)) ** 4)
    policy = resolve(policy, model.config, scores)
    out = generate(model, params, prompts, new, policy=policy, eos_ids=())
    assert [len(tokens) for tokens in out.tokens] == [new, new]
    return out


@pytest.fixture(scope="module")
def warm():
    """A model that has served a policy of either scorer."""
    model, params = build(GQA, GQA)
    for policy in (SNAPKV, "headkv:kv_size=20"):
        run(model, params, policy)
    return functools.partial(run, model, params)


SAME = {
    "sharing": {"policy": "adasnapkv:kv_size=20"},
    "another allocator": {"policy": "pyramidkv:kv_size=20"},
    "head importance": {"policy": "headkv_paper:kv_size=20"},
    "another beta": {"policy": "headkv:kv_size=20,beta=1.3"},
    "sharing by importance": {"policy": "headkv_adaptive:kv_size=20"},
    "another KV size of its bucket": {"policy": "snapkv:kv_size=19"},
    "a share of the prompt": {"policy": "snapkv:ratio=0.5"},
    "more new tokens of their bucket": {"policy": SNAPKV, "new": 64},
    "other lengths of their bucket": {"policy": SNAPKV, "lengths": (48, 34)},
}


@pytest.mark.parametrize("what", SAME)
def test_nothing_is_compiled_for(what, warm):
    with counted() as programs:
        warm(**SAME[what])
    assert programs.compiled == []


def test_a_further_scorer_compiles_what_ranks(warm):
    with counted() as programs:
        warm("knorm:kv_size=20")
    assert names(programs) == ["rank_heads"]


def test_a_scorer_that_watches_compiles_a_block_that_reads(warm):
    with counted() as programs:
        warm("h2o:kv_size=20")
    assert sorted(names(programs)) == ["rank_heads", "read_layer"]


def names(programs):
    """The functions that were compiled."""
    return [name.removeprefix("jit(").removesuffix(")") for name in programs.compiled]


def programs_of(attention, policy):
    """What a fresh process compiles for a model with these layers."""
    model, params = build(*attention)
    jax.clear_caches()
    with counted() as programs:
        run(model, params, policy)
    return sorted(names(programs))


@pytest.mark.parametrize("policy", ["full", SNAPKV, f"{SNAPKV},entries=int4"])
def test_layers_share_their_programs(policy):
    few, many = (programs_of((GQA,) * count, policy) for count in (2, 6))
    assert few == many


def test_converted_layers_share_programs_whatever_their_frequencies():
    def layer(*pairs):
        rope = RopeConfig(4, scaling=SelectedPairs(RopeConfig(8), pairs))
        return DecoupledConfig(GQA, rank=12, rope=rope, v_head_dim=8)

    same = programs_of((layer(0, 1),) * 2, "full")
    other = programs_of((layer(0, 1), layer(2, 2)), "full")
    assert same == other
    assert other.count("read_layer") == 1


def test_kinds_of_layers_have_programs_of_their_own():
    sliding = dataclasses.replace(GQA, window=13)
    found = programs_of((GQA, sliding, GQA, sliding), SNAPKV)
    for name in ("read_layer", "rank_heads", "compress_heads"):
        assert found.count(name) == 2, name
