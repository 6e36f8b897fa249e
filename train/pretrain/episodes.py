"""Training sequences: one context, then several questions about the context, with answers.

Sequences are drawn at random from facts about people (`kvjax.tasks`); one kind copies random words.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from kvjax.checks import COUNT, Range
from kvjax.fields import Count, NotNegative, Says, Share
from kvjax.tasks import people, prompt, words
from kvjax.tasks.words import WordVocabulary

KINDS = ("thing", "age", "older", "two_hop", "copy")
"""Kinds of questions; `EpisodeBatch.kind` holds indices into this tuple."""


OPTIONAL = frozenset((*words.FUNCTION, ":", "?", "'s"))
"""Words that `thin` may leave out."""


CUE = 2
"""Number of words of a copied span that are given before the rest is asked for."""


@dataclass(frozen=True)
class EpisodeBatch:
    """Sequences of T + 1 tokens with up to Q questions each.

    Attributes:
        tokens: int32 [B, T + 1].
        question: int32 [B, T]: number of the question that target token t + 1 answers; −1: none.
        kind: int32 [B, Q]: index into KINDS of each question; −1 beyond the last question.
    """

    tokens: np.ndarray
    question: np.ndarray
    kind: np.ndarray


Pair = Annotated[tuple[Count, Count], Says("[least, most] from 1 up")]


@dataclass(frozen=True)
class EpisodeConfig:
    """Settings of the sequences of a stage.

    Attributes:
        length: T.
        people: smallest and largest number of people.
        answer_length: smallest and largest number of words of a favorite thing.
        questions: largest number of questions; fewer where they would leave no room for filler.
        kinds: relative frequency of each kind of question. The context tells ages only if some
            question needs them. "copy" cannot be mixed with other kinds: spans of random words
            return, and after CUE words the next `answer_length` words are the answer.
        wording: probability of each word that carries no information. At 0 a fact shrinks to
            "mary lantern ." and a question to "mary".
    """

    length: Annotated[int, Range(least=2, most=COUNT.most, whole=True)]
    people: Pair
    answer_length: Pair
    questions: Count
    kinds: Mapping[str, NotNegative]
    wording: Share = 1.0


def make_batch(
    rng: np.random.Generator, vocab: WordVocabulary, config: EpisodeConfig, batch_size: int
) -> EpisodeBatch:
    """Draws `batch_size` sequences."""
    batch = EpisodeBatch(
        tokens=np.full((batch_size, config.length + 1), vocab.pad_id, np.int32),
        question=np.full((batch_size, config.length), -1, np.int32),
        kind=np.full((batch_size, config.questions), -1, np.int32),
    )
    fill = _fill_copies if set(config.kinds) == {"copy"} else _fill_facts
    for row in range(batch_size):
        fill(rng, vocab, config, batch, row)
    return batch


def _fill_copies(rng, vocab, config, batch, row):
    """One sequence: random words, then spans of them, each after one to three other words."""
    # The spans stand at the end of the sequence, each with its cue; `at` is where they begin.
    low, high = config.answer_length
    first_word = len(words.SPECIAL)
    lengths = rng.integers(low, high + 1, config.questions) + CUE
    gaps = rng.integers(1, 4, config.questions)
    at = config.length + 1 - int((lengths + gaps).sum())
    batch.tokens[row] = rng.integers(first_word, vocab.size, config.length + 1)
    batch.tokens[row, 0] = vocab.bos_id
    starts = at + np.cumsum(lengths + gaps) - lengths
    # Copy each span from a random position; the words after its cue are the answer.
    for index, (length, start) in enumerate(zip(lengths, starts, strict=True)):
        source = rng.integers(1, at - length + 1)
        batch.tokens[row, start : start + length] = batch.tokens[row, source : source + length]
        batch.question[row, start + CUE - 1 : start + length - 1] = index
        batch.kind[row, index] = KINDS.index("copy")


def _fill_facts(rng, vocab, config, batch, row):
    """One sequence: facts in filler, then questions until the room is used."""
    # People, and the facts about them.
    count = int(rng.integers(config.people[0], config.people[1] + 1))
    low, high = config.answer_length
    cast = people.draw_people(rng, rng.integers(low, high + 1, count).tolist())
    facts = [people.likes(person) for person in cast]
    if set(config.kinds) != {"thing"}:
        facts += [people.is_old(person) for person in cast]
    facts = [vocab.encode(thin(rng, fact, config.wording)) for fact in facts]
    # Questions, as long as they fit beside the facts.
    room = config.length + 1 - sum(map(len, facts)) - 1
    asked = []
    for kind in _draw_kinds(rng, config):
        question, answer = _ask(rng, kind, cast)
        question, answer = vocab.encode(thin(rng, question, config.wording)), vocab.encode(answer)
        room -= len(question) + len(answer) + 1
        if room < 0:
            break
        asked.append((kind, question, answer))
    # The questions stand at the end; facts and filler take all tokens before them.
    at = config.length + 1 - sum(len(q) + len(a) + 1 for _, q, a in asked)
    filler = functools.partial(prompt.sentences, vocab=vocab)
    context = prompt.strew(rng, facts, at, [vocab.bos_id], (), None, filler)
    batch.tokens[row, :at] = context.ids
    for index, (kind, question, answer) in enumerate(asked):
        text = [*question, *answer, vocab.eos_id]
        batch.tokens[row, at : at + len(text)] = text
        first = at + len(question) - 1  # targets are shifted by one
        batch.question[row, first : first + len(answer) + 1] = index
        batch.kind[row, index] = KINDS.index(kind)
        at += len(text)


def thin(rng: np.random.Generator, text: str, wording: float) -> str:
    """Leaves out words that carry no information, each with probability 1 − `wording`.

    Whole sentences are hard to learn at first: the model must carry a name over several words in
    the fact and in the question before either helps. In a shrunk one it is one word away.
    """
    if wording >= 1:
        return text
    return " ".join(word for word in text.split() if word not in OPTIONAL or rng.random() < wording)


def _draw_kinds(rng, config) -> list[str]:
    names = list(config.kinds)
    weights = np.array([config.kinds[name] for name in names], np.float64)
    chosen = rng.choice(len(names), config.questions, p=weights / weights.sum())
    return [names[i] for i in chosen]


def _ask(rng, kind: str, cast: list[people.Person]) -> tuple[str, str]:
    """A question of this kind about random people, and its answer."""
    order = rng.permutation(len(cast))
    a, b = cast[order[0]], cast[order[-1]]
    right = people.older(a, b)
    return {
        "thing": (people.ask_thing(a), a.thing),
        "age": (people.ask_age(a), str(a.age)),
        "older": (people.ask_older(a, b), right.name),
        "two_hop": (people.ask_thing_of_older(a, b), right.thing),
    }[kind]
