"""Overlap of words: the F1 of question answering."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

ARTICLES = re.compile(r"\b(?:a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """Lower case, without ASCII punctuation and articles, single spaces: SQuAD's rule.

    The order is SQuAD's too (arXiv 1606.05250): punctuation goes first, so "a-1" is one word.
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split())


def qa_f1(answer: str, reference: str) -> float:
    """`word_f1` of the normalized words: English question answering (arXiv 2308.14508, table 1)."""
    return word_f1(normalized(answer).split(), normalized(reference).split())


def word_f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    """F1 = 2PR / (P + R), order ignored; 0 without a common word.

    P and R are the shares of the answer's and the reference's words that the other has too, each
    as often as in both. `kvjax.text.token_f1` is the same for token ids.
    """
    common = sum((Counter(answer) & Counter(reference)).values())
    return 2 * common / (len(answer) + len(reference)) if common else 0.0


def exact_match(answer: str, reference: str) -> float:
    """Whether both are the same when normalized."""
    return float(normalized(answer) == normalized(reference))
