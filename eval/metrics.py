"""Scores of an answer against one reference, from 0 to 1, as the long-context benchmarks use them.

In order: words (F1 and exact match), ROUGE-L, Chinese text, classes and numbers, lines of code, and
the plain form of numbers that several tasks compare.

LongBench cuts Chinese into words with the package jieba. Where jieba is not installed, every
character is a word (runs of Latin letters and digits stay whole). The numbers differ, so the
metrics are then called qa_f1_zh_chars and rouge_zh_chars.
"""

from __future__ import annotations

import difflib
import functools
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Sequence

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

    P and R are the shares of the answer's and the reference's words that the other text has too,
    each counted as often as in both. `kvjax.text.token_f1` is the same for token ids.
    """
    common = sum((Counter(answer) & Counter(reference)).values())
    return 2 * common / (len(answer) + len(reference)) if common else 0.0


def exact_match(answer: str, reference: str) -> float:
    """1 if both texts are equal when normalized, else 0."""
    return float(normalized(answer) == normalized(reference))


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
    # The union over all pairs of sentences, as Lin's equations say.
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
    # Walk back from the end of the table to collect the words.
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
    """Words of each part between full stops. A part of spaces only has one empty word."""
    return [part.split() or [""] for part in text.split(".") if part]


MISSING = (
    'jieba is not installed (pip install "kvjax[chinese]"): Chinese was scored by characters, '
    "not words"
)

# The marks that LongBench removes. It leaves others, such as an opening 《, as words.
MARKS = frozenset(
    string.punctuation
    + "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】"
    + "〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏"
)
CHARACTER = re.compile(r"[A-Za-z0-9]+|\S|\s+")

Cut = Callable[[str], list[str]]


@functools.cache
def jieba_cut() -> Cut | None:
    """The word segmentation of jieba; None where it is not installed."""
    try:
        with warnings.catch_warnings():  # of its old syntax
            warnings.simplefilter("ignore")
            import jieba  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return lambda text: list(jieba.cut(text, cut_all=False))


def characters(text: str) -> list[str]:
    """Single characters; runs of Latin letters and digits, and runs of spaces, stay whole."""
    return CHARACTER.findall(text)


def cut(text: str) -> list[str]:
    """Words of a Chinese text, by jieba where it is installed, else its characters."""
    return (jieba_cut() or characters)(text)


def metric_name(name: str) -> str:
    """The metric's name; it ends in "_chars" where text is cut into characters."""
    return name if jieba_cut() else f"{name}_chars"


def qa_f1_zh(answer: str, reference: str) -> float:
    """As `qa_f1`, on Chinese words without marks and spaces."""
    return word_f1(_words(answer), _words(reference))


def rouge_zh(answer: str, reference: str) -> float:
    """ROUGE-L on Chinese words; see `rouge_l`."""
    return rouge_l(" ".join(cut(answer)), " ".join(cut(reference)))


def _words(text: str) -> list[str]:
    words = ("".join(c for c in word.lower() if c not in MARKS) for word in cut(text))
    return [word for word in map(_unspaced, words) if word]


def _unspaced(word: str) -> str:
    return "".join(word.split())


def classification(answer: str, reference: str, classes: Collection[str]) -> float:
    """1/n if the reference is among the n classes that the answer names, else 0.

    A class that is part of the reference's name ("Sport" of "Sport event") does not count, because
    the longer name contains the shorter one. This is LongBench's metric of TREC and LSHT. Its own
    code skips every second class while it removes these; this code does not.
    """
    # Keep classes that the answer names, without those inside the reference's name.
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


NO_CODE = ("`", "#", "//")
"""Marks of lines that are a fence or have a comment."""


def code_similarity(answer: str, reference: str) -> float:
    """2M / T of the answer's first line of code and the reference, in whole hundredths.

    M is the number of characters in matching blocks, T the number of characters of both strings
    (Ratcliff and Obershelp, as in `difflib`). It is LongBench's "edit sim" of LCC and RepoBench-P,
    from the package fuzzywuzzy, which uses difflib too unless python-Levenshtein is installed.
    """
    lines = answer.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in NO_CODE)), "")
    if line == reference:
        return 1.0
    return round(100 * difflib.SequenceMatcher(None, line, reference).ratio()) / 100


DASHES = dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-")
WIDE = dict(zip("０１２３４５６７８９，．：＄％＋／⁄", "0123456789,.:$%+//", strict=True))
INVISIBLE = dict.fromkeys("\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff", "")
CHARACTERS = str.maketrans(DASHES | WIDE | INVISIBLE)

NARROW = "\u00a0\u2006\u2007\u2008\u2009\u200a\u202f"
"""Spaces that typography puts inside numbers."""
BETWEEN_THOUSANDS = f"{NARROW}_'\u2019"

LATEX_SPACE = re.compile(r"\{\\,\}|\\[,;: ]|\\thinspace\b|(?<!\\)~|&nbsp;|&thinsp;")
# A run of backslashes is tried once, from its start: otherwise its length would count squared.
WRAPPER = re.compile(
    r"(?<!\\)\\+(?:boxed|fbox|mbox|hbox|text(?:bf|it|rm|sf|tt|normal|style)?|emph|underline"
    r"|boldsymbol|bm|math(?:bf|it|rm|sf|tt|normal)|displaystyle|left|right)(?![a-zA-Z])\s*"
)
FRACTION = re.compile(r"(?<![\d}])\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}")
ESCAPED = re.compile(r"\\([$%#&])")
MATH = re.compile(r"\\[()\[\]]|(?<![\^_])\{|\}|`+")
# Stars and underscores at the edge of a word. Between two factors they are an operator.
EMPHASIS = re.compile(r"(?<![\w)*])[*_]+(?=[^\s*_])|(?<=[^\s*_])[*_]+(?![\w(*])")


def plain(text: str, spaces: bool = False) -> str:
    r"""The text with each number as on a keyboard: "\boxed{1{,}234}" becomes text with 1,234.

    LaTeX, typographic characters and Markdown's emphasis are removed. Separators of thousands
    become commas. Lists ("1,2"), ranges ("3-4"), products ("2*3") and powers keep their form.

    Args:
        spaces: whether an ordinary space also separates thousands, as in "10 000".
    """
    # LaTeX and typography first, so that only plain digits are grouped below.
    text = FRACTION.sub(r"\1/\2", text.translate(CHARACTERS))
    text = text.replace("\\!", "").replace("{,}", ",")
    text = ESCAPED.sub(r"\1", WRAPPER.sub("", LATEX_SPACE.sub("\u2009", text)))
    between = BETWEEN_THOUSANDS + " " * spaces
    # One to three digits, then groups of three; 1.234 and 3-4 stay.
    groups = rf"(?<![\w.,])[1-9]\d{{0,2}}(?:[{between}]\d{{3}})+(?!\d|-[a-zA-Z])"
    text = re.sub(groups, lambda found: re.sub(f"[{between}]", ",", found[0]), text)
    # Narrow spaces that are left did not separate thousands.
    text = re.sub(f"[{NARROW}]", " ", text)
    return MATH.sub(" ", EMPHASIS.sub("", text))


DIGITS = 1000
NO_NUMBER = -1
"""Stands for a number of more than `DIGITS` digits, which no reference has. Python's own limit of
digits is an error, and an answer must not raise one."""


def whole_number(digits: str) -> int:
    """The value of a text of digits."""
    return int(digits) if len(digits) <= DIGITS else NO_NUMBER


def whole_numbers(text: str) -> list[int]:
    """All whole numbers, signs ignored: "1,234" is one number and "1,2" are two."""
    found = re.findall(r"(?<!\d)[1-9]\d{0,2}(?:,\d{3})+(?!\d)|\d+", plain(text))
    return [whole_number(number.replace(",", "")) for number in found]
