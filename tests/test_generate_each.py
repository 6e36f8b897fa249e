"""Several policies on the same prompts, which are read once: each answers as it does alone."""

import sys

import numpy as np
import pytest
from toys import random_params

from kvjax import generation
from kvjax.config import GQAConfig, LayerConfig, MLPConfig, ModelConfig, RopeConfig
from kvjax.generation import generate, generate_each
from kvjax.nn import Transformer
from kvjax.policies.named import parse_policy
from kvjax.prefilling import compressions, shape_bytes

LAYERS, VOCAB = 2, 89
POLICIES = (
    "full",
    "snapkv:kv_size=12,observed=4",
    "h2o:kv_size=16",
    "tova:kv_size=12,observed=1,compression_interval=4",
    "full:entries=int8",
)
SETTINGS = {"max_new_tokens": 9, "eos_ids": (), "batch_size": 3}


@pytest.fixture(scope="module")
def loaded():
    layer = LayerConfig(GQAConfig(4, 2, 8, 8**-0.5, RopeConfig(8)), MLPConfig(32))
    model = Transformer(
        ModelConfig("llama", VOCAB, 32, (layer,) * LAYERS, max_position_embeddings=160)
    )
    return model, random_params(model)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(3)
    lengths = (25, 31, 32, 40, 28, 47, 30, 34, 27)  # of two buckets, in whole batches of three
    return [rng.integers(1, VOCAB, n).tolist() for n in lengths]


@pytest.fixture
def layers_read(monkeypatch):
    """A list with one item for each layer that prefill has read."""
    module, found = sys.modules["kvjax.prefilling"], []
    read = module.read_layer

    def counted(*args, **settings):
        found.append(len(settings["observers"]))
        return read(*args, **settings)

    monkeypatch.setattr(module, "read_layer", counted)
    return found


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_each_policy_gives_what_it_gives_alone(loaded, prompts, layers_read, temperature):
    settings = SETTINGS | {"temperature": temperature}
    alone = [generate(*loaded, prompts, policy=policy, **settings) for policy in POLICIES]
    batches = len(layers_read) // (LAYERS * len(POLICIES))
    assert batches == 3  # of two buckets
    del layers_read[:]
    order = []

    def on_result(number, result):
        order.append((number, [list(tokens) for tokens in result.tokens]))

    found = generate_each(*loaded, prompts, POLICIES, on_result=on_result, **settings)
    assert found == alone
    assert len({str(result.tokens) for result in found}) > 2
    assert len(layers_read) == batches * LAYERS
    assert order == [(number, result.tokens) for number, result in enumerate(alone)]


def test_a_caller_ends_answers_of_one_policy(loaded, prompts):
    whole = generate_each(*loaded, prompts, POLICIES, **SETTINGS)
    got = {}

    def on_tokens(policy, prompt, new):
        got.setdefault((policy, prompt), []).extend(new)
        return policy == 1 and len(got[policy, prompt]) == 3 + prompt % 2

    found = generate_each(*loaded, prompts, POLICIES, on_tokens=on_tokens, **SETTINGS)
    for policy, (result, rest) in enumerate(zip(found, whole, strict=True)):
        for prompt, tokens in enumerate(rest.tokens):
            expected = tokens[: 3 + prompt % 2] if policy == 1 else tokens
            assert result.tokens[prompt] == got[policy, prompt] == expected


def test_caches_that_are_too_large_together_are_read_for_in_groups(
    loaded, prompts, layers_read, monkeypatch
):
    policies, batch = [parse_policy(name) for name in POLICIES], prompts[:3]
    alone = [generate(*loaded, batch, policy=policy, **SETTINGS) for policy in policies]
    sizes = [result.cache_bytes for result in alone]
    most = sizes[0] + sizes[1]
    assert sizes[0] + sizes[1] + sizes[2] > most < sizes[2] + sizes[3] + sizes[4]
    monkeypatch.setattr(generation, "bytes_together", lambda: most)
    del layers_read[:]
    found = generate_each(*loaded, batch, policies, **SETTINGS)
    assert found == alone
    groups = generation.together(
        compressions(*loaded, np.asarray([len(p) for p in batch]), policies, 9), 32
    )
    assert len(groups) > 1 and len(layers_read) == len(groups) * LAYERS
    monkeypatch.setattr(generation, "bytes_together", lambda: 1)  # even one is too large
    assert generate_each(*loaded, batch, policies[:2], **SETTINGS) == alone[:2]


def test_the_bytes_of_caches_are_known_before_they_are_made(loaded, prompts):
    lengths = np.asarray([len(prompt) for prompt in prompts[:3]], np.int32)
    for policy in map(parse_policy, POLICIES):
        (work,) = compressions(*loaded, lengths, [policy], 9)
        out = generate(*loaded, prompts[:3], policy=policy, **SETTINGS)
        assert shape_bytes(work, 32) == out.cache_bytes


def test_errors_are_those_of_generation(loaded, prompts):
    for wrong, message in (
        ({"policies": ["full", "best"]}, "is not one of"),
        ({"max_new_tokens": 500}, "expected at most 160 in all"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"compile": "all"}, "compile is 'all'"),
    ):
        settings = {"policies": POLICIES, **SETTINGS, **wrong}
        with pytest.raises(ValueError, match=message):
            generate_each(*loaded, prompts, **settings)
