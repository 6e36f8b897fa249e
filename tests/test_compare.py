"""Policies compared on one prefill answer as generation under each of them does."""

import dataclasses

import numpy as np
import pytest

import kvjax
from kvjax.headkv.policy import resolve
from kvjax.headkv.scores import default_scores
from kvjax.pipelines.compare import compare
from kvjax.tasks import WordVocabulary, make_examples

NAMES = ("snapkv:kv_size=16", "headkv:kv_size=24", "h2o:kv_size=40", "adasnapkv:kv_size=24")


@pytest.fixture(scope="module")
def loaded():
    return kvjax.load("builtin:needle", dtype="float32")


@pytest.fixture(scope="module")
def examples():
    vocab = WordVocabulary()
    return [
        example
        for task in ("needle", "two_hop")
        for example in make_examples(task, vocab, 5, 128, answer_lengths=(1, 6))
    ]


def policies(model):
    scores = default_scores(model.config)
    return {name: resolve(name, model.config, scores) for name in NAMES}


def test_the_question_inside(loaded, examples):
    model, params = loaded
    got = compare(model, params, examples, policies(model), batch_size=4)
    prompts = [example.prompt for example in examples]
    seen = set()
    for name in ("full", *NAMES):
        out = kvjax.generate(model, params, prompts, max_new_tokens=8, policy=name)
        right = [t == list(e.answer) for t, e in zip(out.tokens, examples, strict=True)]
        np.testing.assert_array_equal(got.right[name], right)
        seen |= {(name, bool(hit)) for hit in right}
    assert len({hit for _, hit in seen}) == 2  # some right, some wrong: the comparison can fail
    assert got.cache_bytes["snapkv:kv_size=16"] < 0.2 * got.cache_bytes["full"]


def test_the_question_after(loaded, examples):
    model, params = loaded
    names = NAMES[:2]
    chosen = {name: policies(model)[name] for name in names}
    got = compare(model, params, examples, chosen, "after", batch_size=4)
    for name in ("full", *names):
        for index in (0, 7):
            example = examples[index]
            cut = len(example.prompt) - example.question_length
            context = kvjax.compress(model, params, example.prompt[:cut], name)
            question = [example.prompt[cut:]]
            out = kvjax.generate(model, params, question, max_new_tokens=8, context=context)
            assert got.right[name][index] == (out.tokens[0] == list(example.answer))


def test_errors(loaded, examples):
    model, params = loaded
    with pytest.raises(ValueError, match="protocol is 'before', expected one of inside, after"):
        compare(model, params, examples, {}, "before")
    two = policies(model)
    two["wide"] = dataclasses.replace(two[NAMES[0]], window=4)
    with pytest.raises(ValueError, match=r"windows \[4, 8\], expected one"):
        compare(model, params, examples, two)
    silent = [dataclasses.replace(examples[0], question_length=0)]
    with pytest.raises(ValueError, match="example 0 does not say how long its question is"):
        compare(model, params, silent, {}, "after")
