"""Similarity of a line of code."""

from __future__ import annotations

import difflib

NO_CODE = ("`", "#", "//")
"""What a line has that is a fence or holds a comment."""


def code_similarity(answer: str, reference: str) -> float:
    """2M / T of the answer's first line of code and the reference, in whole hundredths.

    M is the number of characters in matching blocks, T that of both strings (Ratcliff and
    Obershelp, as `difflib` has it). LongBench's "edit sim" of LCC and RepoBench-P, which takes it
    from the package fuzzywuzzy; that one uses difflib too unless python-Levenshtein is installed.
    """
    lines = answer.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in NO_CODE)), "")
    if line == reference:
        return 1.0
    return round(100 * difflib.SequenceMatcher(None, line, reference).ratio()) / 100
