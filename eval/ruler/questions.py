"""RULER's question answering: a question's paragraphs among other paragraphs (section 3.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval.ruler.text import Prompt, compose, cut
from kvjax.tasks.words import TokenizerVocabulary
from kvjax.text_files import read_json


@dataclass(frozen=True)
class Question:
    """A question, its right answers, and the paragraphs that contain them."""

    text: str
    answers: tuple[str, ...]
    paragraphs: tuple[str, ...]


@dataclass(frozen=True)
class Corpus:
    """Questions, and all paragraphs without repetitions."""

    questions: tuple[Question, ...]
    paragraphs: tuple[str, ...]


def squad(path: Path) -> Corpus:
    """The questions of a file of SQuAD 1.1 or 2.0 (arXiv 1806.03822) that have an answer.

    Raises:
        ValueError: no such file, or another format.
    """
    found = read_json(path)
    try:
        paragraphs = [p for article in found["data"] for p in article["paragraphs"]]
        questions = [
            Question(qa["question"], _texts(qa["answers"]), (p["context"],))
            for p in paragraphs
            for qa in p["qas"]
            if qa["answers"] and not qa.get("is_impossible", False)
        ]
        return _corpus(path, questions, [p["context"] for p in paragraphs])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not in SQuAD's format: {error!r}") from None


def hotpotqa(path: Path) -> Corpus:
    """A file of HotpotQA's distractor setting (arXiv 1809.09600), with its supporting facts.

    Raises:
        ValueError: no such file, or another format.
    """
    found = read_json(path)
    try:
        paragraphs, questions = [], []
        for row in found:
            told = {title: f"{title}. {''.join(sentences)}" for title, sentences in row["context"]}
            # A dict removes repeated titles and keeps their order.
            needed = dict.fromkeys(title for title, _ in row["supporting_facts"])
            paragraphs += told.values()
            gold = tuple(told[title] for title in needed if title in told)
            questions.append(Question(row["question"], (row["answer"],), gold))
        return _corpus(path, questions, paragraphs)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not in HotpotQA's format: {error!r}") from None


def question_prompt(
    rng: np.random.Generator,
    vocab: TokenizerVocabulary,
    length: int,
    question: Question,
    paragraphs: Sequence[str],
) -> Prompt:
    """One prompt of exactly `length` tokens. The last of the other paragraphs is cut to fit.

    Raises:
        ValueError: `length` cannot hold the question and its paragraphs, or there are too few.
    """
    # The question's own paragraphs are placed by `compose`, so the haystack leaves them out.
    told = frozenset(question.paragraphs)

    def fill(rng: np.random.Generator, room: int) -> list[list[int]]:
        order = [paragraphs[int(i)] for i in rng.permutation(len(paragraphs))]
        return cut((vocab.encode(_document(p)) for p in order if p not in told), room)

    frame = (
        "Answer the question that follows these documents, from them and with few words.\n\n",
        f"\n\nQuestion: {question.text}",
        "Answer:",
    )
    facts = [_document(paragraph) for paragraph in question.paragraphs]
    return compose(rng, vocab, length, frame, facts, question.answers, fill)


def _document(paragraph: str) -> str:
    return f"Document: {paragraph.strip()}\n"


def _texts(answers: Sequence[dict[str, str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(answer["text"] for answer in answers))


def _corpus(path: Path, questions: list[Question], paragraphs: list[str]) -> Corpus:
    if not questions:
        raise ValueError(f"{path} has no questions with answers, expected at least one")
    return Corpus(tuple(questions), tuple(dict.fromkeys(paragraphs)))
