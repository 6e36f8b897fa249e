"""Training sequences: every marked target is the answer to the question before it."""

import numpy as np
import pytest

from kvjax.tasks import WordVocabulary, make_examples
from train.pretrain.episodes import KINDS, EpisodeConfig, make_batch, thin

VOCAB = WordVocabulary()
CONFIG = EpisodeConfig(
    length=192,
    people=(2, 4),
    answer_length=(1, 3),
    questions=5,
    kinds={"thing": 1, "age": 1, "older": 1, "two_hop": 1},
)


@pytest.fixture(scope="module")
def batch():
    return make_batch(np.random.default_rng(0), VOCAB, CONFIG, 16)


def facts(text):
    """Favorite thing and age of everyone in a text."""
    words = text.split()
    things, ages = {}, {}
    for i in range(1, len(words)):
        if words[i : i + 4] == ["'s", "favorite", "thing", "is"]:
            end = words.index(".", i)
            things[words[i - 1]] = words[i + 4 : end]
        if words[i : i + 2] == ["years", "old"]:
            ages[words[i - 3]] = words[i - 1]
    return things, ages


def test_answers_follow_from_the_facts(batch):
    seen = set()
    for tokens, question, kinds in zip(batch.tokens, batch.question, batch.kind, strict=True):
        things, ages = facts(VOCAB.decode(tokens))
        for index, kind in enumerate(kinds[kinds >= 0]):
            at = np.flatnonzero(question == index)
            answer = VOCAB.decode(tokens[at + 1]).split()
            asked = VOCAB.decode(tokens[: at[0] + 1]).split("question :")[-1].split()
            people = [name for name in asked if name in things]
            older = max(people, key=lambda name: ages[name])
            expected = {
                "thing": things[people[0]],
                "age": [ages[people[0]]],
                "older": [older],
                "two_hop": things[older],
            }[KINDS[kind]]
            assert answer == [*expected, "<eos>"]
            seen.add(KINDS[kind])
    assert seen == set(CONFIG.kinds)


def test_sequences_are_full(batch):
    assert batch.tokens.shape == (16, CONFIG.length + 1)
    assert (batch.tokens != VOCAB.pad_id).all()
    assert (batch.tokens[:, 0] == VOCAB.bos_id).all()
    assert (batch.tokens[:, -1] == VOCAB.eos_id).all()


def test_thin_keeps_what_carries_information():
    rng = np.random.default_rng(0)
    fact = "mary 's favorite thing is lantern violin ."
    assert thin(rng, fact, 0.0) == "mary lantern violin ."
    assert thin(rng, fact, 1.0) == fact
    lengths = {len(thin(rng, fact, 0.5).split()) for _ in range(50)}
    assert min(lengths) >= 4 and max(lengths) <= 8 and len(lengths) > 2


def test_evaluation_prompts_are_not_training_prompts():
    examples = make_examples("needle", VOCAB, 8, 96)
    assert examples == make_examples("needle", VOCAB, 8, 96)
    assert examples != make_examples("needle", VOCAB, 8, 96, seed=1)
    config = EpisodeConfig(120, (1, 1), (1, 12), 1, {"thing": 1})
    training = {
        row.tobytes()
        for step in range(20)
        for row in make_batch(np.random.default_rng([0, step]), VOCAB, config, 8).tokens[:, :40]
    }
    assert len(training) == 160
    for example in examples:
        assert np.asarray(example.prompt[:40], np.int32).tobytes() not in training


def test_unknown_task():
    with pytest.raises(ValueError, match="task is 'nedle', expected one of needle"):
        make_examples("nedle", VOCAB, 1, 96)
