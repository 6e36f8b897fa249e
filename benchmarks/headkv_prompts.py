"""Prompts for a real model: five kinds of questions about a book, each with its answer's tokens.

Prompts are in the chat template, if the tokenizer has one, with the beginning of the answer in the
assistant's turn. An answer is right if the model writes exactly its tokens, so only questions with
one right wording are here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from eval import rows
from kvjax.chat import has_chat_template
from kvjax.example import Example
from kvjax.tasks import needle
from kvjax.tasks.english import ENGLISH
from kvjax.tasks.language import Needles
from kvjax.tasks.prompt import Haystack, read_haystack, strew
from kvjax.tasks.words import TokenizerVocabulary

CUE, QUOTED = 12, 8
"""Tokens of a sentence that the prompt repeats, and of those that should follow."""
LENGTHS = (1000, 1000, 1000, 2000)
"""Tokens of the prompts of a task, in turn; BABILong's have about 750 and 1500."""


@dataclass(frozen=True)
class Source:
    """What prompts are made of.

    Attributes:
        book: the text around the facts.
        babilong: by number of tokens, rows of BABILong's first task.
    """

    vocab: TokenizerVocabulary
    book: Haystack
    babilong: dict[int, list[rows.Row]]

    @classmethod
    def read(cls, tokenizer: Any, book: Path, babilong: Path) -> Source:
        """Reads a text, and babilong_1k.jsonl and babilong_2k.jsonl (also packed) of a folder."""
        vocab = TokenizerVocabulary(tokenizer, has_chat_template(tokenizer))
        files = {n: rows.find(babilong, f"babilong_{n // 1000}k", (".jsonl",)) for n in LENGTHS}
        asked = {
            n: [r for r in rows.read_rows(f) if r.text("task") == "qa1"] for n, f in files.items()
        }
        return cls(vocab, read_haystack(book, vocab), asked)


def number(source: Source, rng: np.random.Generator, length: int, index: int) -> Example:
    """RULER's needle: a number of seven digits."""
    return needle.generate(rng, source.vocab, length, filler=source.book)


def multi_key(source: Source, rng: np.random.Generator, length: int, index: int) -> Example:
    """The same among the numbers of three other keys."""
    return needle.generate(rng, source.vocab, length, distractors=3, filler=source.book)


def uuid(source: Source, rng: np.random.Generator, length: int, index: int) -> Example:
    """RULER's needle with a UUID, which is about 35 tokens."""
    kinds = Needles(value="uuid")
    return needle.generate(rng, source.vocab, length, filler=source.book, needles=kinds)


def person(source: Source, rng: np.random.Generator, length: int, index: int) -> Example:
    """The favorite thing of one of two people, two words in plain sentences."""
    vocab, (asked, other) = source.vocab, ENGLISH.people(rng, [None, None])
    told = [f"{who.name}'s favorite thing is the {who.thing}." for who in (asked, other)]
    before, after = vocab.around(
        "The following text says what some people like best. I will ask you about them "
        "afterwards.\n",
        f"\nWhat is {asked.name}'s favorite thing?",
        f"{asked.name}'s favorite thing is the",
    )
    facts = list(map(vocab.encode, told))
    context = strew(rng, facts, length, before, after, None, source.book)
    return Example(context.ids, tuple(vocab.encode(asked.thing)), question_length=len(after))


def quote(source: Source, rng: np.random.Generator, length: int, index: int) -> Example:
    """The continuation of a sentence of the book whose first tokens are repeated."""
    before, after = source.vocab.around(
        "Here is a text.\n", "\n\nHere is a sentence from this text, word for word:\n"
    )
    pieces = source.book(rng, length - len(before) - len(after) - CUE)
    whole = [piece for piece in pieces if len(piece) > CUE + QUOTED]
    said = whole[int(rng.integers(len(whole)))]
    text = [index for piece in pieces for index in piece]
    asked = [*after, *said[:CUE]]
    answer = tuple(said[CUE : CUE + QUOTED])
    return Example((*before, *text, *asked), answer, question_length=len(asked))


def place(source: Source, rng: np.random.Generator, length: int, index: int) -> Example:
    """BABILong's first task: where somebody is, who moved several times."""
    vocab, found = source.vocab, source.babilong[length]
    row = found[index % len(found)]
    question = row.text("question").strip()
    who = question.removeprefix("Where is ").removesuffix("?").strip()
    before, after = vocab.around(
        "The following text says where some people are. I will ask you about them afterwards.\n\n",
        f"\n\n{question}",
        f"The most recent location of {who} is the",
    )
    text, answer = vocab.encode(row.text("input").strip()), vocab.encode(row.text("target").strip())
    return Example((*before, *text, *after), tuple(answer), question_length=len(after))


TASKS: dict[str, Callable[[Source, np.random.Generator, int, int], Example]] = {
    make.__name__: make for make in (number, quote, multi_key, uuid, person, place)
}


def make_prompts(source: Source, count: int, seed: int) -> list[Example]:
    """`count` prompts of each task, one of each task in turn; their names are the tasks'."""
    found = []
    for index in range(count):
        for task, make in enumerate(TASKS.values()):
            # A prompt's random numbers do not depend on the number of prompts.
            rng = np.random.default_rng([seed, task, index])
            example = make(source, rng, LENGTHS[index % len(LENGTHS)], index)
            found.append(replace(example, name=list(TASKS)[task], then_eos=False))
    return found


def without_beginning(source: Source, example: Example) -> tuple[Example, int]:
    """The prompt up to the place where the answer's turn begins, and the number of tokens cut off.

    These tokens, the beginning of the answer, become the first ones of the answer.
    """
    _, opening = source.vocab.around("", "")
    n, prompt = len(opening), list(example.prompt)
    at = next(i for i in range(len(prompt), n - 1, -1) if prompt[i - n : i] == opening)
    cut = replace(example, prompt=tuple(prompt[:at]), answer=(*prompt[at:], *example.answer))
    return cut, len(prompt) - at


def write_prompts(examples: Sequence[Example], path: Path) -> None:
    """One JSON line a prompt: its task, and the ids of prompt and answer."""
    lines = [
        json.dumps({"task": e.name, "prompt": list(e.prompt), "answer": list(e.answer)})
        for e in examples
    ]
    path.write_text("".join(f"{line}\n" for line in lines))
