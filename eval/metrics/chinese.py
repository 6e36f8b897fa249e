"""Chinese text as words, and the metrics on them.

LongBench cuts Chinese into words with the package jieba. Where that is not installed, every
character is a word of its own (runs of Latin letters and digits stay whole). The numbers differ,
so the metrics are then called qa_f1_zh_chars and rouge_zh_chars.
"""

from __future__ import annotations

import functools
import re
import string
import warnings
from collections.abc import Callable

from eval.metrics.rouge import rouge_l
from eval.metrics.words import word_f1

MISSING = "jieba is not installed (pip install jieba): Chinese was scored by characters, not words"

# The marks that LongBench removes; others, such as an opening 《, remain words, as there.
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
    """Every character by itself, runs of Latin letters and digits whole, spaces in one piece."""
    return CHARACTER.findall(text)


def cut(text: str) -> list[str]:
    """Words, by jieba where there is one."""
    return (jieba_cut() or characters)(text)


def metric_name(name: str) -> str:
    """The name with what it was cut by, where that is not jieba."""
    return name if jieba_cut() else f"{name}_chars"


def qa_f1_zh(answer: str, reference: str) -> float:
    """As `eval.metrics.words.qa_f1`, on Chinese words without marks and spaces."""
    return word_f1(_words(answer), _words(reference))


def rouge_zh(answer: str, reference: str) -> float:
    """ROUGE-L on Chinese words; see `eval.metrics.rouge.rouge_l`."""
    return rouge_l(" ".join(cut(answer)), " ".join(cut(reference)))


def _words(text: str) -> list[str]:
    words = ("".join(c for c in word.lower() if c not in MARKS) for word in cut(text))
    return [word for word in map(_unspaced, words) if word]


def _unspaced(word: str) -> str:
    return "".join(word.split())
