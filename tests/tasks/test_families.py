"""Splits share no query, rows are deterministic, and accuracy is judged by the problems."""

import json

import pytest

import kvjax
from kvjax.tasks import WordVocabulary
from kvjax.tasks.families import FAMILIES, problems, rows, split_of
from train.compare.runs import family_accuracy, write_rows


@pytest.mark.parametrize("family", FAMILIES)
def test_train_and_test_share_no_query(family):
    train = {row["query"] for row in rows(family, 2000, seed=0)}
    test = {row["query"] for row in rows(family, 400, seed=0, split="test")}
    assert len(train) == 2000 and len(test) == 400
    assert not train & test
    assert not test & {row["query"] for row in rows(family, 2000, seed=1)}
    assert {split_of(query) for query in test} == {"test"}


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_deterministic_and_solve(family):
    assert rows(family, 50, seed=3) == rows(family, 50, seed=3)
    assert rows(family, 50, seed=3) != rows(family, 50, seed=4)
    assert rows(family, 50, seed=3)[:20] == rows(family, 20, seed=3)
    found = problems(family, 50, seed=3)
    assert [p.response for p in found] == [row["response"] for row in rows(family, 50, seed=3)]
    assert all(problem.solved(problem.response) for problem in found)


def test_difficulties_of_ones_own():
    kinds = {p.kind for p in problems("word_problems", 60, seed=0, difficulties=(1,))}
    assert kinds == {"over", "under"}


def test_unknown_names():
    with pytest.raises(ValueError, match="family is 'chess', expected one of word_problems"):
        rows("chess", 1, seed=0)
    with pytest.raises(ValueError, match="split is 'dev', expected one of train, test"):
        rows("programs", 1, seed=0, split="dev")


def test_written_rows(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    write_rows(path, "programs", 5, seed=2, split="test")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == rows("programs", 5, seed=2, split="test")


def test_accuracy_is_what_the_problems_say(monkeypatch):
    vocab = WordVocabulary()
    found = problems("programs", 10, seed=0)
    answers = {tuple(vocab.encode(p.query)): vocab.encode(p.response) for p in found[:4]}
    batches = []

    def generate(model, params, prompts, max_new_tokens, eos_ids, batch_size):
        assert all(prompt[0] == vocab.bos_id for prompt in prompts)
        batches.append(len(prompts))
        return kvjax.Generation([answers.get(tuple(prompt[1:]), [40]) for prompt in prompts])

    monkeypatch.setattr(kvjax, "generate", generate)
    share, error, texts = family_accuracy(None, {}, found, batch_size=4)
    assert share == 0.4
    assert error == pytest.approx((0.4 * 0.6 / 10) ** 0.5)
    assert texts == [p.response if i < 4 else vocab.decode([40]) for i, p in enumerate(found)]
    assert all(size % 4 == 0 for size in batches)


def test_accuracy_of_the_embedded_model_is_nought_before_it_is_tuned():
    model, params = kvjax.load("builtin:needle", dtype="float32")
    for family in FAMILIES:
        share, error, texts = family_accuracy(model, params, problems(family, 6, 0, "test"), 4, 8)
        assert (share, error, len(texts)) == (0.0, 0.0, 6)


def test_no_problems():
    with pytest.raises(ValueError, match="got no problems"):
        family_accuracy(None, {}, [])
