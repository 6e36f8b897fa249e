"""Every score takes every text: what a model writes is wrong at worst, and stops nothing.

The long texts have 20,000 signs. A score that looks at each pair of signs would take minutes.
"""

import pytest

from eval import metrics, run
from eval.task import Item, Task
from eval.tasks import babilong, code, gsm8k, haystack, longchat, loogle, ruler

LONG = 20_000
RUNS = [
    "-",
    "$",
    "$ ",
    "\\",
    "{",
    "(",
    "*",
    "_ ",
    "`",
    "9,",
    "1'",
    ".",
    "a. ",
    "中 ",
    "\ud800",
    "\0",
]
DIGITS = "9" * 5000
"""More digits than Python turns into a number."""

TEXTS = [
    *("", " ", "²", "①", "1/0", "1_000", "\ud800", "\\frac{1}{0}", "The answer is 1e999999"),
    *(
        "{1, 2}",
        "{[]: 1}",
        "{{1}: 2}",
        "{'<mask-0>': {1}}",
        "{1: 2",
        "}{",
        "{1: 0x" + "f" * 5000 + "}",
    ),
    *(run * (LONG // len(run)) for run in RUNS),
    *(
        DIGITS,
        f"The answer is {DIGITS}",
        f"1/{DIGITS}",
        f".{DIGITS}",
        f"{{{DIGITS}: 1}}",
        "٣" * 5000,
    ),
    *(f"Paragraph {DIGITS}", f"段落{DIGITS}", f"<mask-{DIGITS}>: a", f"\\frac{{{DIGITS}}}{{2}}"),
    *("{-" + "-" * 5000 + "1: 2}", "{" + "[" * 5000 + "}", "{1:" * 3000 + "}"),
    *(start + " " * LONG for start in ("The answer is", "The answer is :", "A^", "mask-0")),
    *("1" + "\u00a0999" * 5000, "1" + " 000" * 5000 + "x", "The answer is$" + " $" * 9000),
    *("west, " * 3000, "```" * 5000, "[BEGIN]" * 3000),
]
"""What no model should write."""

REFERENCE = "42. the cat, Paragraph 12"
MASKS = {"<mask-0>": "Ann"}


def item(reference, group="", **meta):
    return Item("id", "prompt", (reference,), 5, group, meta)


SUMMED = {
    kind: item("1, 2", kind=kind, masks=MASKS)
    for kind in ("qa", "timeline_reorder", "shortdep_cloze")
}
MBPP = item("def f(x): return x", setup="", tests=["assert f(1) == 1"])

SCORES = {
    "qa_f1": lambda text: metrics.qa_f1(text, REFERENCE),
    "exact_match": lambda text: metrics.exact_match(text, REFERENCE),
    "rouge_l": lambda text: metrics.rouge_l(text, REFERENCE),
    "rouge_zh": lambda text: metrics.rouge_zh(text, REFERENCE),
    "count": lambda text: metrics.count(text, REFERENCE),
    "code_similarity": lambda text: metrics.code_similarity(text, REFERENCE),
    "qa_f1_zh": lambda text: metrics.qa_f1_zh(text, REFERENCE),
    "classification": lambda text: metrics.classification(text, "b", ["a", "b", "c"]),
    "retrieval": lambda text: metrics.retrieval(text, REFERENCE),
    "strict": lambda text: gsm8k.score_strict(item("42"), text),
    "flexible": lambda text: gsm8k.score_flexible(item("42"), text),
    "gsm8k": lambda text: gsm8k.summary([(item("42"), text, 0.0)])["strict"],
    "longchat": lambda text: longchat.score(item("42"), text),
    "qa1": lambda text: babilong.score(item("kitchen", task="qa1", question="where"), text),
    "qa19": lambda text: babilong.score(item("w,e", task="qa19", question="how"), text),
    "ruler": lambda text: ruler.score(item("42", task="niah_single_1"), text),
    "timeline": lambda text: loogle.score(item("1, 2", kind="timeline_reorder"), text),
    "cloze": lambda text: loogle.score(item("Ann", kind="shortdep_cloze", masks=MASKS), text),
    "summary": lambda text: loogle.score(item("a. b", kind="longdep_summarization"), text),
    "computation": lambda text: loogle.score(item("42", loogle.COMPUTATION, kind="qa"), text),
    "loogle": lambda text: bool(loogle.summary([(i, text, 0.0) for i in SUMMED.values()])) * 0.5,
    "needle": lambda text: haystack.judged("contains", haystack.first_sentence(text), ("4821973",)),
    "recall": lambda text: haystack.judged("rouge1_recall", text, ("4821973",)),
    "mbpp": lambda text: bool(code.mbpp_program(MBPP, text).answer) * 0.5,
}


@pytest.mark.parametrize("name", SCORES)
def test_every_text_has_a_score(name):
    for text in TEXTS:
        assert 0 <= SCORES[name](text) <= 1, text[:30]


def test_long_numbers_equal_nothing():
    assert metrics.whole_numbers(f"7 {DIGITS} 1,234") == [7, metrics.NO_NUMBER, 1234]
    assert metrics.whole_numbers("0" * 999 + "7") == [7]


def test_a_score_that_fails_is_zero_and_said():
    def score(item, answer):
        return 1 / len(answer)

    task = Task("words", (), score, "share")
    assert run.score_of(task, item("x"), "ab") == 0.5
    with pytest.warns(UserWarning, match="words, item id: no score .ZeroDivisionError"):
        assert run.score_of(task, item("x"), "") == 0
