"""ROUGE-L: the longest common subsequence, summed over sentences."""

from __future__ import annotations

from collections.abc import Sequence


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L F1 at the level of summaries, in the form LongBench reports.

    With r the reference's sentences, c the answer's and ∪ the set of words that a longest common
    subsequence of some pair (r, c) holds:

        R = |∪| / |words of the reference|,  P = |∪| / |words of the answer|,  F = 2PR / (P + R)

    Words are counted once, however often they occur; sentences end at full stops. This is what
    the package `rouge` 1.0.1 computes for Lin's equations (ROUGE: A Package for Automatic
    Evaluation of Summaries, 2004, section 3.2), up to its 1e-8 in the denominator.
    """
    answer_sentences, reference_sentences = _sentences(answer), _sentences(reference)
    if not answer_sentences or not reference_sentences:
        return 0.0
    common: set[str] = set()
    for wanted in reference_sentences:
        for got in answer_sentences:
            common.update(common_subsequence(wanted, got))
    words = {word for sentence in answer_sentences for word in sentence}
    expected = {word for sentence in reference_sentences for word in sentence}
    precision, recall = len(common) / len(words), len(common) / len(expected)
    return 2 * precision * recall / (precision + recall) if common else 0.0


def common_subsequence(a: Sequence[str], b: Sequence[str]) -> list[str]:
    """A longest common subsequence; of several the one whose end in `a` is latest.

    With t[i, j] its length for the first i and j words: t[i, j] = t[i−1, j−1] + 1 where they are
    equal, else max(t[i−1, j], t[i, j−1]).
    """
    lengths = [[0] * (len(b) + 1)]
    for word in a:
        above, row = lengths[-1], [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        lengths.append(row)
    i, j, found = len(a), len(b), []
    while i and j:
        if a[i - 1] == b[j - 1]:
            found.append(a[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found[::-1]


def _sentences(text: str) -> list[list[str]]:
    """Words of each part between full stops; one of spaces alone has the empty word."""
    return [part.split() or [""] for part in text.split(".") if part]
