"""Answers that name a class or a number."""

from __future__ import annotations

import re
from collections.abc import Collection


def classification(answer: str, reference: str, classes: Collection[str]) -> float:
    """1/n if the reference is among the n classes that the answer names, else 0.

    A class that is part of the reference's name ("Sport" of "Sport event") is not counted: whoever
    writes the longer one also writes the shorter. LongBench's metric of TREC and LSHT; its own code
    skips every second class while it removes these, which is not imitated.
    """
    named = [c for c in classes if c in answer and (c == reference or c not in reference)]
    return 1 / len(named) if reference in named else 0.0


def count(answer: str, reference: str) -> float:
    """Share of the answer's numbers that are the reference; 0 without a number."""
    numbers = re.findall(r"\d+", answer)
    return numbers.count(reference.strip()) / len(numbers) if numbers else 0.0


def retrieval(answer: str, reference: str) -> float:
    """As `count`; the reference is like "Paragraph 12"."""
    return count(answer, number_after("Paragraph ", reference))


def retrieval_zh(answer: str, reference: str) -> float:
    """As `count`; the reference is like "段落12"."""
    return count(answer, number_after("段落", reference))


def number_after(mark: str, text: str) -> str:
    """The digits after a mark.

    Raises:
        ValueError: there are none.
    """
    found = re.search(rf"{mark}(\d+)", text)
    if found is None:
        raise ValueError(f"got reference {text!r:.80}, expected {mark!r} and a number")
    return found[1]
