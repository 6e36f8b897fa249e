"""Policies compared on one prefill answer as generation under each of them does."""

import dataclasses

import numpy as np
import pytest
from toys import random_params

import kvjax
from kvjax.config import GQAConfig, LayerConfig, MLPConfig, ModelConfig, RopeConfig
from kvjax.example import Example
from kvjax.headkv import HeadScores
from kvjax.nn import Transformer
from kvjax.policies.named import resolve
from kvjax.scoring import compare

NAMES = (
    "snapkv:kv_size=16",
    "headkv:kv_size=24,window=4",
    "h2o:kv_size=40",
    "adasnapkv:kv_size=24",
)
VOCAB, EOS, ITEMS = 8, 2, 10
SCORES = HeadScores(np.random.default_rng(0).random((2, 4, 5)) ** 4)
SETTINGS = {"max_new_tokens": 8, "batch_size": 5}


@pytest.fixture(scope="module")
def loaded():
    layer = LayerConfig(GQAConfig(4, 2, 8, 8**-0.5, RopeConfig(8)), MLPConfig(32))
    config = ModelConfig(
        "llama", VOCAB, 32, (layer, layer), max_position_embeddings=256, eos_ids=(EOS,)
    )
    model = Transformer(config)
    return model, random_params(model)


@pytest.fixture(scope="module")
def examples(loaded):
    """Random prompts with what the model writes, half of it under a small budget, as answers."""
    model, params = loaded
    rng = np.random.default_rng(0)
    found = []
    for policy in ("full", NAMES[0]):
        prompts = [rng.integers(0, VOCAB, n).tolist() for n in range(109, 129)]
        out = kvjax.generate(model, params, prompts, policy=policy, **SETTINGS)
        pairs = zip(prompts, out.tokens, strict=True)
        ended = [pair for pair in pairs if 0 < len(pair[1]) < SETTINGS["max_new_tokens"]]
        found += ended[: ITEMS // 2]
    assert len(found) == ITEMS
    return [
        Example(tuple(prompt), tuple(answer), question_length=3 + index % 7)
        for index, (prompt, answer) in enumerate(found)
    ]


def policies(model):
    return {name: resolve(name, model.config, SCORES) for name in ("full", *NAMES)}


def test_the_question_inside(loaded, examples):
    model, params = loaded
    chosen = policies(model)
    full = chosen.pop("full")
    got = compare(model, params, examples, chosen, batch_size=SETTINGS["batch_size"])
    prompts = [example.prompt for example in examples]
    seen = set()
    for name, policy in {"full": full, **chosen}.items():
        out = kvjax.generate(model, params, prompts, policy=policy, **SETTINGS)
        right = [t == list(e.answer) for t, e in zip(out.tokens, examples, strict=True)]
        np.testing.assert_array_equal(got.right[name], right)
        seen |= {(name, bool(hit)) for hit in right}
    # Each is right and wrong somewhere: the comparison can fail.
    assert seen == {(name, hit) for name in ("full", *NAMES) for hit in (True, False)}
    assert got.cache_bytes["snapkv:kv_size=16"] < 0.2 * got.cache_bytes["full"]


def test_the_first_token_is_the_uncompressed_model_s(loaded):
    """What docs/evaluation.md says of decoded answers: only later tokens see the compression."""
    model, params = loaded
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, VOCAB, 128).tolist() for _ in range(10)]
    settings = {**SETTINGS, "eos_ids": ()}
    full, small = (
        kvjax.generate(model, params, prompts, policy=policy, **settings).tokens
        for policy in ("full", "snapkv:kv_size=10,window=4")
    )
    assert [tokens[0] for tokens in small] == [tokens[0] for tokens in full]
    assert small != full


def test_the_question_after(loaded, examples):
    model, params = loaded
    chosen = policies(model)
    names = ("full", *NAMES[:2])
    got = compare(
        model, params, examples, {name: chosen[name] for name in names[1:]}, "after", batch_size=4
    )
    for name in names:
        for index in (0, 7):
            example = examples[index]
            cut = len(example.prompt) - example.question_length
            context = kvjax.compress(model, params, example.prompt[:cut], chosen[name])
            question = [example.prompt[cut:]]
            out = kvjax.generate(model, params, question, max_new_tokens=8, context=context)
            assert got.right[name][index] == (out.tokens[0] == list(example.answer))


def test_errors(loaded, examples):
    model, params = loaded
    with pytest.raises(ValueError, match="protocol is 'before', expected one of inside, after"):
        compare(model, params, examples, {}, "before")
    silent = [dataclasses.replace(examples[0], question_length=0)]
    with pytest.raises(ValueError, match="example 0 does not say how long its question is"):
        compare(model, params, silent, {}, "after")
