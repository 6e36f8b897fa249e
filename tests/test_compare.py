"""Policies compared on one prefill answer as decoding from each compressed cache does."""

import dataclasses

import numpy as np
import pytest
from toys import random_params

import kvjax
from kvjax.cache import without_last
from kvjax.config import GQAConfig, LayerConfig, MLPConfig, ModelConfig, RopeConfig
from kvjax.example import Example
from kvjax.headkv import HeadScores
from kvjax.nn import Transformer
from kvjax.policies.named import resolve
from kvjax.scoring import compare

NAMES = (
    "snapkv:kv_size=16",
    "headkv:kv_size=24,observed=4",
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


def writes(loaded, example, policy):
    """Whether greedy decoding writes the answer from a compressed cache that takes the last token
    of the prompt again."""
    model, params = loaded
    ids, lengths = np.asarray([example.prompt], np.int32), np.asarray([len(example.prompt)])
    _, cache = kvjax.prefill(model, params, ids, lengths, policy)
    cache, token, found = without_last(cache, [True]), ids[:, -1], []
    for _ in range(len(example.answer) + 1):
        logits, cache = kvjax.decode_step(model, params, cache, token)
        token = np.asarray(logits).argmax(-1).astype(np.int32)
        found += token.tolist()
    return found == [*example.answer, EOS]


def test_the_question_inside(loaded, examples):
    model, params = loaded
    chosen = policies(model)
    full = chosen.pop("full")
    got = compare(model, params, examples, chosen, batch_size=SETTINGS["batch_size"])
    seen = set()
    for name, policy in {"full": full, **chosen}.items():
        right = [writes(loaded, example, policy) for example in examples]
        np.testing.assert_array_equal(got.right[name], right)
        seen |= {(name, bool(hit)) for hit in right}
    prompts = [example.prompt for example in examples]
    out = kvjax.generate(model, params, prompts, **SETTINGS)
    right = [t == list(e.answer) for t, e in zip(out.tokens, examples, strict=True)]
    np.testing.assert_array_equal(got.right["full"], right)
    # Each is right and wrong somewhere: the comparison can fail.
    assert seen == {(name, hit) for name in ("full", *NAMES) for hit in (True, False)}
    assert got.cache_bytes["snapkv:kv_size=16"] < 0.2 * got.cache_bytes["full"]


def test_policies_by_name(loaded, examples):
    names = NAMES[0], "streaming:kv_size=24"
    chosen = {name: resolve(name, loaded[0].config, None) for name in names}
    got = compare(*loaded, examples[:2], dict(zip(names, names, strict=True)))
    want = compare(*loaded, examples[:2], chosen)
    assert got.cache_bytes == want.cache_bytes
    assert {k: v.tolist() for k, v in got.right.items()} == {
        k: v.tolist() for k, v in want.right.items()
    }


def test_the_first_token_sees_the_compressed_cache(loaded):
    """A policy that looks at no query keeps of a prompt what it keeps without the last token, and
    the last token."""
    model, params = loaded
    names = ("streaming:kv_size=16,observed=6", "streaming:kv_size=15,observed=5")
    whole, cut = (resolve(name, model.config, SCORES) for name in names)
    rng, found, firsts = np.random.default_rng(2), [], []
    for length in range(100, 124):
        prompt = rng.integers(0, VOCAB, length).tolist()
        context = kvjax.compress(model, params, prompt[:-1], cut)
        (answer,) = kvjax.generate(model, params, [prompt[-1:]], 8, context=context).tokens
        if 0 < len(answer) < 8:
            found.append(Example(tuple(prompt), tuple(answer)))
            out = kvjax.generate(model, params, [prompt], 1, policy=whole, eos_ids=())
            firsts.append(out.tokens[0][0] == answer[0])
    got = compare(model, params, found, {"streaming": whole})
    assert len(found) > 4 and got.right["streaming"].all()
    assert not all(firsts)  # generation's first token, from the uncompressed prefill, is another


def test_the_first_token_is_the_uncompressed_model_s(loaded):
    """What docs/evaluation.md says of decoded answers: only later tokens see the compression."""
    model, params = loaded
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, VOCAB, 128).tolist() for _ in range(10)]
    settings = {**SETTINGS, "eos_ids": ()}
    full, small = (
        kvjax.generate(model, params, prompts, policy=policy, **settings).tokens
        for policy in ("full", "snapkv:kv_size=10,observed=4")
    )
    assert [tokens[0] for tokens in small] == [tokens[0] for tokens in full]
    assert small != full


def test_an_answer_may_go_on(loaded, examples):
    """Where an example says so, nothing but the answer's own tokens counts."""
    model, params = loaded
    first = [example for example in examples[: ITEMS // 2] if len(example.answer) > 1]
    begun = [
        dataclasses.replace(example, answer=example.answer[:-1], then_eos=then_eos)
        for then_eos in (False, True)
        for example in first
    ]
    got = compare(model, params, begun, {}).right["full"]
    assert got.tolist() == [True] * len(first) + [False] * len(first) and first
    endless = Transformer(dataclasses.replace(model.config, eos_ids=()))
    assert compare(endless, params, begun[:1], {}).right["full"].all()
    with pytest.raises(ValueError, match="no EOS id, expected one"):
        compare(endless, params, begun[-1:], {})


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
    with pytest.raises(ValueError, match="example 0 has question_length 0"):
        compare(model, params, silent, {}, "after")
