"""Word problems: the worked solution is right, and only its final number is judged."""

import itertools
import re
from collections import Counter

import numpy as np
import pytest

from kvjax.tasks import WordVocabulary, words
from kvjax.tasks.prompt import LONGEST
from kvjax.tasks.word_problems import KINDS, LEVELS, FinalNumber, generate

VOCAB = WordVocabulary()


def draw(count, level=None, seed=0):
    rng = np.random.default_rng(seed)
    return [generate(rng, VOCAB, level or 1 + i % 3) for i in range(count)]


def ages_of(query):
    """Everybody's age, from the sentences of a query alone."""
    ages = {name: int(age) for name, age in re.findall(r"(\w+) is (\d+) years old", query)}
    pattern = r"(\w+) is (?:older , )?(\d+) years (over|under) (\w+)"
    relations = re.findall(pattern, query)
    for _ in relations:
        for name, step, side, other in relations:
            if other in ages:
                ages[name] = ages[other] + (1 if side == "over" else -1) * int(step)
    return ages


def answer_of(query):
    """The answer by a solver that shares nothing with the generator."""
    ages, question = ages_of(query), query.split("question : ")[1]
    asked = [ages[word] for word in question.split() if word in ages]
    if "between" in question:
        return abs(asked[0] - asked[1])
    return sum(asked)


@pytest.mark.parametrize("level", LEVELS)
def test_the_reference_is_the_right_answer(level):
    for problem in draw(200, level):
        answer = answer_of(problem.query)
        assert problem.response.endswith(f". {answer}")
        assert problem.solved(problem.response)
        assert problem.solved(str(answer))
        assert problem.kind in LEVELS[level].kinds


@pytest.mark.parametrize("level", LEVELS)
def test_words_and_lengths(level):
    for problem in draw(200, level):
        assert problem.query.endswith("answer :")
        ids = VOCAB.encode(f"{problem.query} {problem.response}")
        assert VOCAB.unknown_id not in ids
        assert len(ids) + 2 <= LONGEST


def test_solutions_count_in_tens_and_then_the_rest():
    for problem in draw(300):
        for sentence in problem.response.split(" . ")[:-1]:
            stops = [int(word) for word in sentence.split(" : ")[1].split()]
            gaps = [abs(b - a) for a, b in itertools.pairwise(stops)]
            assert set(gaps[:-1]) <= {10} and 1 <= gaps[-1] <= 10


def test_a_chain_uses_its_first_result_in_the_second_step():
    chains = [problem for problem in draw(300) if problem.kind == "chain"]
    assert len(chains) > 20
    for problem in chains:
        first, second, last = problem.response.split(" . ")
        assert second.split(" : ")[1].split()[0] == first.split()[-1]
        assert second.split()[-1] == last


def test_wrong_numbers_and_garbage_do_not_solve():
    rng = np.random.default_rng(1)
    for problem in draw(300):
        *worked, answer = problem.response.split()
        other = rng.choice([age for age in words.AGES if age != answer])
        assert not problem.solved(" ".join([*worked, other]))
        assert not problem.solved(problem.response + f" {other}")
        assert not problem.solved(" ".join(worked))
        assert not problem.solved(problem.response + " years")
        for text in (
            "",
            ".",
            " . . ",
            "mary",
            "mary .",
            "<eos>",
            "four",
            f"{answer}5",
            "-" + answer,
        ):
            assert not problem.solved(text)
        said = rng.choice([token for token in VOCAB.tokens if token != answer], 8)
        assert not problem.solved(" ".join(said))


def test_a_full_stop_may_follow_the_number():
    assert FinalNumber(34)("john is 20 over mary : 14 24 34 . 34 .")
    assert FinalNumber(34)("34")
    assert not FinalNumber(34)("34 . .")
    assert not FinalNumber(34)("john is 20 over mary : 14 24 34")


def test_every_kind_occurs_at_its_levels():
    for level, expected in LEVELS.items():
        counts = Counter(problem.kind for problem in draw(400, level))
        assert set(counts) == set(expected.kinds)
        assert min(counts.values()) > 400 / len(expected.kinds) / 2
    assert set(LEVELS[2].kinds) == set(LEVELS[3].kinds) == set(KINDS)


def test_sentences_are_shuffled_and_have_distractors_from_level_two_on():
    for level, most in ((1, 0), (2, 1), (3, 2)):
        extra = set()
        for problem in draw(200, level):
            needed = {"together": 2, "between": 2}.get(problem.kind, 1)
            extra.add(problem.query.count("years old") - needed)
        assert max(extra) == most
    starts = {problem.query.split()[3] == "years" for problem in draw(100, 2)}
    assert starts == {True, False}


def test_guessing_is_right_at_most_one_time_in_fifteen():
    found = draw(900)
    numbers = [re.findall(r"\d+", problem.query) for problem in found]
    copies = [p.solved(n) for p, said in zip(found, numbers, strict=True) for n in said]
    assert not any(copies)
    answers = Counter(problem.response.split()[-1] for problem in found)
    assert answers.most_common(1)[0][1] < len(found) / 15


def test_same_generator_state_same_problem():
    assert draw(20, seed=3) == draw(20, seed=3)
    assert draw(20, seed=3) != draw(20, seed=4)


def test_errors():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="level is 4, expected one of 1, 2, 3"):
        generate(rng, VOCAB, 4)
    with pytest.raises(ValueError, match="the vocabulary lacks the words"):
        generate(rng, WordVocabulary(VOCAB.tokens[:40]), 1)
