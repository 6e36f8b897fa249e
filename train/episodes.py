"""Training sequences: one context, then several questions about it, each with its answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from kvjax.tasks import prompt, recall, words
from kvjax.tasks.words import WordVocabulary

KINDS = ("thing", "age", "older", "two_hop", "copy")
"""What a question can be about, in the order of `Batch.kind`."""

OPTIONAL = frozenset((*words.FUNCTION, ":", "?", "'s"))
"""Words that `thin` may leave out."""


CUE = 2
"""Words of a copied span that are given before the rest is asked for."""


@dataclass(frozen=True)
class Batch:
    """Sequences of T + 1 tokens, and which of them answer what.

    Attributes:
        tokens: int32 [B, T + 1].
        question: int32 [B, T]: the question that target token t + 1 answers, −1 for none.
        kind: int32 [B, Q]: index into KINDS of each question, −1 where there are fewer.
    """

    tokens: np.ndarray
    question: np.ndarray
    kind: np.ndarray


@dataclass(frozen=True)
class EpisodeConfig:
    """What the sequences of a stage look like.

    Attributes:
        length: T.
        people: least and largest number of people.
        answer_length: least and largest number of words of a favorite thing.
        questions: how many at most; fewer where they would leave no room for filler.
        kinds: how often each kind of question is asked, relative to the others. Ages stand in
            the context only if some question needs them.
            "copy" stands alone: random words, spans of which return; `answer_length` words are to
            be continued after CUE of them.
        wording: probability that a word of a fact or a question that carries no information is
            there; at 0 they shrink to "mary lantern ." and "mary".
    """

    length: int
    people: tuple[int, int]
    answer_length: tuple[int, int]
    questions: int
    kinds: Mapping[str, float]
    wording: float = 1.0


def make_batch(
    rng: np.random.Generator, vocab: WordVocabulary, config: EpisodeConfig, batch_size: int
) -> Batch:
    """`batch_size` random sequences."""
    batch = Batch(
        tokens=np.full((batch_size, config.length + 1), vocab.pad_id, np.int32),
        question=np.full((batch_size, config.length), -1, np.int32),
        kind=np.full((batch_size, config.questions), -1, np.int32),
    )
    fill = _fill_copies if set(config.kinds) == {"copy"} else _fill_facts
    for row in range(batch_size):
        fill(rng, vocab, config, batch, row)
    return batch


def _fill_copies(rng, vocab, config, batch, row):
    """Random words, then spans of them, each after one to three other words."""
    low, high = config.answer_length
    first_word = len(words.SPECIAL)
    lengths = rng.integers(low, high + 1, config.questions) + CUE
    gaps = rng.integers(1, 4, config.questions)
    at = config.length + 1 - int((lengths + gaps).sum())
    batch.tokens[row] = rng.integers(first_word, vocab.size, config.length + 1)
    batch.tokens[row, 0] = vocab.bos_id
    starts = at + np.cumsum(lengths + gaps) - lengths
    for index, (length, start) in enumerate(zip(lengths, starts, strict=True)):
        source = rng.integers(1, at - length + 1)
        batch.tokens[row, start : start + length] = batch.tokens[row, source : source + length]
        batch.question[row, start + CUE - 1 : start + length - 1] = index
        batch.kind[row, index] = KINDS.index("copy")


def _fill_facts(rng, vocab, config, batch, row):
    """One sequence: facts in filler, then questions until the room is used."""
    count = int(rng.integers(config.people[0], config.people[1] + 1))
    low, high = config.answer_length
    cast = recall.draw_people(rng, rng.integers(low, high + 1, count).tolist())
    facts = [person.likes() for person in cast]
    if set(config.kinds) != {"thing"}:
        facts += [person.is_old() for person in cast]
    facts = [vocab.encode(thin(rng, fact, config.wording)) for fact in facts]
    room = config.length + 1 - sum(map(len, facts)) - 1
    asked = []
    for kind in _draw_kinds(rng, config):
        question, answer = _ask(rng, kind, cast)
        question, answer = vocab.encode(thin(rng, question, config.wording)), vocab.encode(answer)
        room -= len(question) + len(answer) + 1
        if room < 0:
            break
        asked.append((kind, question, answer))
    at = config.length + 1 - sum(len(q) + len(a) + 1 for _, q, a in asked)
    batch.tokens[row, :at] = prompt.strew(rng, vocab, facts, at).ids
    for index, (kind, question, answer) in enumerate(asked):
        text = [*question, *answer, vocab.eos_id]
        batch.tokens[row, at : at + len(text)] = text
        first = at + len(question) - 1  # targets are shifted by one
        batch.question[row, first : first + len(answer) + 1] = index
        batch.kind[row, index] = KINDS.index(kind)
        at += len(text)


def thin(rng: np.random.Generator, text: str, wording: float) -> str:
    """Leaves out words that carry no information, each with probability 1 − `wording`.

    The whole sentences are hard to learn at first: a name must be carried over several words, in
    the fact and in the question, before either helps. Shrunk ones need it one word away.
    """
    if wording >= 1:
        return text
    return " ".join(word for word in text.split() if word not in OPTIONAL or rng.random() < wording)


def _draw_kinds(rng, config) -> list[str]:
    names = list(config.kinds)
    weights = np.array([config.kinds[name] for name in names], np.float64)
    chosen = rng.choice(len(names), config.questions, p=weights / weights.sum())
    return [names[i] for i in chosen]


def _ask(rng, kind: str, cast: list[recall.Person]) -> tuple[str, str]:
    """A question of this kind about random people, and its answer."""
    order = rng.permutation(len(cast))
    a, b = cast[order[0]], cast[order[-1]]
    right = recall.older(a, b)
    return {
        "thing": (recall.ask_thing(a), a.thing),
        "age": (recall.ask_age(a), str(a.age)),
        "older": (recall.ask_older(a, b), right.name),
        "two_hop": (recall.ask_thing_of_older(a, b), right.thing),
    }[kind]
