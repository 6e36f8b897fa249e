"""Programs are judged by what they do to the row, whoever wrote them."""

import numpy as np
import pytest

from kvjax.tasks import WordVocabulary, programs
from kvjax.tasks.programs import Effect, ProgramError, parse, render, run
from kvjax.tasks.prompt import LONGEST

VOCAB = WordVocabulary()
ROW = ("lantern", "violin", "copper")


def draw(count, commands=None, seed=0):
    rng = np.random.default_rng(seed)
    numbers = [commands or 2 + i % 4 for i in range(count)]
    return [programs.generate(rng, VOCAB, number) for number in numbers]


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ("", "lantern violin copper"),
        ("leaves violin .", "lantern copper"),
        ("calls violin .", "lantern violin copper violin"),
        ("leaves violin . calls violin .", "lantern copper violin"),
        ("follows lantern copper .", "violin copper lantern"),
        ("follows copper lantern .", "lantern copper violin"),
        ("paints violin saddle .", "lantern saddle copper"),
        ("closes .", "copper violin lantern"),
        ("opens .", ""),
        ("opens . calls copper . calls copper . paints copper drum .", "drum copper"),
        ("calls lantern . closes . leaves lantern .", "copper violin lantern"),
    ],
)
def test_programs_by_hand(text, row):
    assert run(parse(text), ROW) == row.split()
    assert render(parse(text)) == text
    assert Effect(ROW, tuple(row.split()))(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("leaves violin", "expected a full stop"),
        ("closes . violin", "expected a full stop"),
        ("leaves .", "leaves got 0 words, expected 1"),
        ("closes violin .", "closes got 1 words, expected 0"),
        ("paints violin .", "paints got 1 words, expected 2"),
        ("violin leaves .", "expected one of leaves"),
        ("leaves violin . .", "got '', expected one of"),
        (".", "got '', expected one of"),
        ("leaves mary .", "got 'mary', expected a thing"),
        ("paints violin answer .", "got 'answer', expected a thing"),
    ],
)
def test_what_is_no_program(text, message):
    with pytest.raises(ProgramError, match=message):
        parse(text)
    assert not Effect(ROW, ROW)(text)


@pytest.mark.parametrize(
    "text",
    [
        "leaves drum .",
        "calls drum .",
        "paints drum lantern .",
        "follows drum violin .",
        "follows violin drum .",
        "follows violin violin .",
        "leaves violin . leaves violin .",
        "opens . leaves violin .",
    ],
)
def test_programs_that_fail(text):
    with pytest.raises(ProgramError, match="is not in the row"):
        run(parse(text), ROW)
    assert not Effect(ROW, ())(text)


def test_running_changes_no_argument():
    start = list(ROW)
    run(parse("closes . opens ."), start)
    assert start == list(ROW)


@pytest.mark.parametrize("commands", [2, 3, 4, 5])
def test_the_reference_is_right_and_has_the_commands_asked_for(commands):
    for problem in draw(100, commands):
        assert problem.query.endswith("answer :")
        assert problem.solved(problem.response)
        assert len(parse(problem.response)) == commands
        ids = VOCAB.encode(f"{problem.query} {problem.response}")
        assert VOCAB.unknown_id not in ids
        assert len(ids) + 2 <= LONGEST


def test_other_programs_do_not_solve():
    rng = np.random.default_rng(1)
    right = 0
    found = draw(400)
    for problem in found:
        program = parse(problem.response)
        assert not problem.solved(render(program[::-1]))
        assert not problem.solved(problem.response[:-2])
        assert not problem.solved("")
        assert not problem.solved(" ".join(rng.choice(VOCAB.tokens, 8)))
        assert not problem.solved(problem.query)
        right += problem.solved(render(program[:-1])) + problem.solved(render(program[1:]))
    assert right < 0.06 * 2 * len(found)


def test_another_program_of_the_same_effect_solves():
    problem = next(p for p in draw(50) if p.kind == "goal")
    assert problem.solved("closes . closes . " + problem.response)
    assert problem.solved("  " + problem.response.replace(" ", "\n"))


def test_kinds_wordings_and_commands_all_occur():
    found = draw(600)
    for kind in programs.KINDS:
        assert sum(problem.kind == kind for problem in found) > 120
    text = " ".join(problem.response for problem in found)
    assert all(text.count(command) > 60 for command in (*programs.WORDINGS, "opens"))
    queries = " ".join(problem.query for problem in found)
    for mark in ("never stays", "again one", "is behind", ", behind", "the early", ", over"):
        assert mark in queries


def test_turned_instructions_stand_in_the_opposite_order():
    for problem in draw(100, 2):
        clauses = problem.query.split(" . ")[1].split(" , ")
        commands = problem.response.split(" . ")
        if problem.kind == "turned":
            clauses.reverse()
        if problem.kind != "goal":
            for clause, command in zip(clauses, commands, strict=True):
                things = command.strip(" .").split()[1:]
                assert set(things) <= set(clause.split())


def test_same_generator_state_same_problem():
    assert draw(20, seed=3) == draw(20, seed=3)
    assert draw(20, seed=3) != draw(20, seed=4)


def test_errors():
    rng = np.random.default_rng(0)
    for commands in (1, 6):
        with pytest.raises(ValueError, match=f"commands is {commands}, expected 2 to 5"):
            programs.generate(rng, VOCAB, commands)
    with pytest.raises(ValueError, match="the vocabulary lacks the words"):
        programs.generate(rng, WordVocabulary(VOCAB.tokens[:40]), 2)
