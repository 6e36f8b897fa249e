"""Scoring: its examples, and how stable importance is."""

import numpy as np
import pytest
from tokenizer_toys import sentencepiece

import kvjax
from kvjax.headkv import load_scores
from kvjax.policies.importance import split_half
from kvjax.tasks import WordVocabulary
from kvjax.tasks.words import TokenizerVocabulary

MODEL = "builtin:needle"


@pytest.fixture(scope="module")
def loaded():
    return kvjax.load(MODEL, dtype="float32"), kvjax.load_tokenizer(MODEL)


def test_examples_for_a_tokenizer_are_those_of_its_vocabulary(loaded):
    _, tokenizer = loaded
    ours, theirs = WordVocabulary(), TokenizerVocabulary(tokenizer)
    assert (ours.bos_id, ours.size) == (theirs.bos_id, theirs.size)
    text = "mary 's favorite thing is velvet anchor . how old is john ?"
    assert ours.encode(text) == theirs.encode(text)


@pytest.mark.parametrize("scheme", ["first", "always", "never", "normalizer"])
def test_a_piece_within_a_sentence_follows_one_space(scheme):
    vocab = TokenizerVocabulary(sentencepiece(scheme))
    tokens = vocab.tokenizer.convert_ids_to_tokens(vocab.encode("the return"))
    assert tokens == ["▁th", "e", "▁re", "t", "u", "r", "n"]


def test_scores_are_stable_under_half_of_the_samples(loaded, tmp_path):
    (model, params), tokenizer = loaded
    scores = kvjax.headkv.score_heads(
        model, params, tokenizer, estimator="enhanced_retrieval", samples=32, length=256
    )
    assert scores.samples.shape[:2] == (model.config.num_layers, 8)
    assert split_half(scores) > 0.95
    scores.save(tmp_path / "heads.json")
    again = load_scores(tmp_path / "heads.json", model.config)
    np.testing.assert_array_equal(again.samples, scores.samples)
    lengths = {sample["length"] for sample in again.meta["samples"]}
    assert lengths == {64, 128, 192, 256}


def test_unknown_estimator(loaded):
    (model, params), tokenizer = loaded
    with pytest.raises(ValueError, match="estimator is 'magic', expected one of retrieval"):
        kvjax.headkv.score_heads(model, params, tokenizer, estimator="magic")
