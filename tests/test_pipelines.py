"""The commands: the demo in small, scoring, and what they write."""

import json

import numpy as np
import pytest
from tokenizer_toys import sentencepiece

import kvjax
from kvjax.commands import demo
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


def test_demo_in_small(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "PROMPT_LENGTH", 128)
    monkeypatch.setattr(demo, "SCORE_LENGTH", 128)
    monkeypatch.setattr(demo, "KV_SIZES", (16,))
    monkeypatch.setattr(demo, "TASKS", ("needle",))
    report = demo.run_demo(tmp_path, samples=8, seed=0)
    written = json.loads((tmp_path / "report.json").read_text())
    assert written == json.loads(json.dumps(report))
    rows = {row["policy"]: row for row in written["tasks"]["needle"]}
    assert set(rows) == {"full", *(f"{p}:kv_size=16" for p in demo.POLICIES)}
    for name, row in rows.items():
        assert (row["cache_bytes"] < rows["full"]["cache_bytes"] / 3) == (name != "full")
    assert all(row["relative_logit_change"] < 1e-5 for row in written["equal_cache"])
    for picture in ("heads.png", "accuracy_needle.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    page = capsys.readouterr().out
    assert "headkv:kv_size=16" in page and "exact match" in page
