"""Answers end at the task's stops, and no token is decoded that nobody reads."""

import dataclasses

import eval_toys as toys
import pytest

from eval import run as running
from eval.predictions import PREDICTIONS, read
from eval.run import evaluate
from eval.stops import ends_at_stops
from eval.task import Settings
from kvjax import generation
from kvjax.text import added_text, until_stop

POLICIES = ("full", "snapkv:kv_size=12,observed=4")
LONGEST = 24


def test_an_answer_has_ended_when_its_text_has_a_stop():
    tokenizer = toys.loaded().tokenizer
    prompts, answer = [[5, 6], [7]], [20, 21, 22, 23]
    stop = added_text(tokenizer, prompts[0], answer[:3])[-3:]
    ended = ends_at_stops(tokenizer, prompts, (stop,))
    # Each policy and each row has a text of its own.
    assert [ended(0, 0, [token]) for token in answer] == [False, False, True, True]
    assert [ended(1, 0, [token]) for token in answer[:3]] == [False, False, True]
    assert not ended(0, 1, answer[:1])
    assert ended(0, 2, answer[:1]), "a row that fills the batch"
    assert not ends_at_stops(tokenizer, prompts, ())(0, 0, answer)
    assert until_stop("a b c d", ("c", "b")) == "a "


@pytest.fixture
def steps(monkeypatch):
    """A list with one item for each step of a batch that is decoded."""
    decode, found = generation.decode, []

    def counted(*args):
        for tokens in decode(*args):
            found.append(tokens)
            yield tokens

    monkeypatch.setattr(generation, "decode", counted)
    return found


def test_a_batch_ends_with_its_last_answer(tmp_path, monkeypatch, steps):
    task = toys.task(7, stops=(" ",))
    items = tuple(dataclasses.replace(item, max_new_tokens=LONGEST) for item in task.items)
    task, settings = dataclasses.replace(task, items=items), Settings(POLICIES, batch_size=3)

    def answers(name):
        del steps[:]
        report = evaluate(toys.loaded(), task, settings, tmp_path / name, quiet=True)
        lines = {(line.policy, line.id): line for line in read(tmp_path / name / PREDICTIONS)}
        return report["policies"], lines, len(steps)

    *early, few = answers("early")
    monkeypatch.setattr(running, "ends_at_stops", lambda *args: None)
    *whole, many = answers("whole")
    assert early == whole
    batches = -(-len(items) // settings.batch_size) * len(POLICIES)
    assert many > batches * LONGEST / 2 and few < many / 4
