"""GSM8K: what counts as an answer, for all 1319 questions and for odd ones."""

import json

import pytest

from eval.rows import Row, named_rows
from eval.task import Item, TaskOptions
from eval.tasks import gsm8k
from kvjax.text import until_stop
from train.data.formats import ALPACA

ROW = {
    "question": "What is {x} times 2, for x = 600?",
    "answer": "It is 600*2 = $<<600*2=1200>>1200.\n#### 1,200",
}


@pytest.fixture
def folder(tmp_path):
    for name in ("train", "test"):
        rows = [ROW, {**ROW, "question": f"{name}?"}]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


@pytest.mark.parametrize(
    ("answer", "strict", "flexible"),
    [
        ("#### 18\nThe answer is: 18", "18", "18"),
        ("The answer is 18.", "18", "18"),
        ("The answer is: $1,234.50.", "$1,234.50", "$1,234.50"),
        ("The answer is: -3", "-3", "-3"),
        ("The answer is: $-3", "$-3", "$-3"),
        ("The answer is: 1/2", "1/2", "1/2"),
        ("The answer is:\n7", "7", "7"),
        ("The answer is: .5 or so", ".5", ".5"),
        ("The answer is: 5. Wait. The answer is: 6", "6", "6"),
        ("The answer is: 5 and then 9 more", "5", "9"),
        ("The answer is: \\boxed{18}", "18", "18"),
        ("so **18** apples", None, "18"),
        ("16-3", None, "3"),
        ("= 10,", None, "10,"),
        ("10 apples, x2 and v1.5", None, "10"),
        ("The answer is: none", None, None),
        ("", None, None),
    ],
)
def test_extraction(answer, strict, flexible):
    assert gsm8k.strict(answer) == strict
    assert gsm8k.flexible(answer) == flexible


DRESSED = [
    *(
        ("\u221218", -18),
        ("\u201318", -18),
        ("\u201118", -18),
        ("\u2212$18", -18),
        ("$\u221218$", -18),
    ),
    *((r"\boxed{18}", 18), ("$18$", 18), ("$$18$$", 18), (r"\$18", 18), (r"\(18\)", 18)),
    *((r"\[ 18 \]", 18), (r"$\boxed{\$1{,}234}$", 1234), (r"\boxed{\text{18 apples}}", 18)),
    *((r"18\text{ apples}", 18), (r"\textbf{18}\%", 18), (r"$\mathbf{-18}$", -18), ("{18}", 18)),
    *((r"\frac{36}{2}", 18), (r"\boxed{\dfrac{36}{2}}", 18), (r"-\frac{36}{2}", -18)),
    *((r"1{,}234", 1234), (r"1\,234{,}567", 1234567), (r"1,\!234", 1234), ("1,234,567", 1234567)),
    *(("1\u2009234", 1234), ("1\u202f234", 1234), ("1\u00a0234", 1234), ("1 234", 1234)),
    *(("10 000", 10000), ("1_234", 1234), ("1\u2019234.50", 1234.5), ("1,00,000", 100000)),
    *(("**18**", 18), ("*18*", 18), ("__18__", 18), ("`18`", 18), ("***$18***.", 18), ("18.", 18)),
    *((r"$\boxed{\text{18}}$", 18), (r"\boxed{\$\textbf{18}}", 18), ("18 m^2", 18)),
    *((r"18\text{ cm}^2", 18), (r"$18 \text{ ft}^{2}$", 18), (r"18 m\(^3\)", 18)),
    *(("18 m s^-1", 18), ("18 m\u00b2", 18)),
    *(("18 dollars", 18), ("18%", 18), ("\u20ac18", 18), ("\u00a3 18", 18), ("\uff11\uff18", 18)),
]


@pytest.mark.parametrize(("written", "number"), DRESSED)
def test_how_a_number_is_dressed_does_not_matter(written, number):
    item = Item("0", "", (str(number),), 1)
    for start in (
        "The answer is: ",
        "**The answer is:** ",
        "so\n*The answer is* ",
        "The answer is:\n",
    ):
        assert gsm8k.score_strict(item, start + written) == 1
        assert gsm8k.score_flexible(item, f"First 2.\n{start}{written}") == 1
    assert gsm8k.score_strict(item, f"That makes {written}") == 0  # its form is another


@pytest.mark.parametrize(
    ("answer", "strict", "flexible"),
    [
        ("The answer is: 1,2", 1, 2),  # a list
        ("The answer is: 1, 2 and 3", 1, 3),
        ("The answer is: 3-4", 3, 4),  # ranges
        ("The answer is: 3\u20134", 3, 4),
        ("The answer is: 2*3", 2, 3),  # products and powers
        ("The answer is: 5 *300", 5, 300),
        ("The answer is: 2**3", 2, 3),
        ("The answer is: 10^{2}", 10, 2),
        (r"The answer is: \sqrt{16}", None, 16),
        ("The answer is: x = 5", None, 5),
        ("The answer is probably 5", None, 5),
        ("1. First", None, 1),
        ("on 2021-03-04", None, 4),
        ("On 2/3/2024", None, 2024),
        ("12 100-dollar bills", None, 100),
        ("In 2021 100 came", None, 100),
        (r"x_{1}", None, 1),
        ("\u201418 it is", None, 18),  # a dash between clauses is no sign
    ],
)
def test_what_is_no_dress_stays(answer, strict, flexible):
    assert gsm8k.value(gsm8k.strict(answer)) == strict
    assert gsm8k.value(gsm8k.flexible(answer)) == flexible


@pytest.mark.parametrize(
    ("written", "reference", "score"),
    [
        ("18.00", "18", 1),
        ("$1,200", "1200", 1),
        ("1200", "1200", 1),
        ("1200.5", "1200", 0),
        ("-18", "18", 0),
        ("36/2", "18", 1),
        ("3/0", "3", 0),
        ("9" * 5000, "9", 0),
    ],
)
def test_numbers_are_compared_by_value(written, reference, score):
    item = Item("0", "", (reference,), 1)
    assert gsm8k.score_strict(item, f"The answer is: {written}") == score
    assert gsm8k.score_flexible(item, f"So {written}") == score


def test_zero_shot(folder):
    task = gsm8k.load(TaskOptions(folder))
    assert task.items[0].prompt == ALPACA.format(query=ROW["question"])
    assert task.items[0].references == ("1200",)
    assert [item.id for item in task.items] == ["gsm8k/0", "gsm8k/1"]
    assert not task.chat and len(gsm8k.load(TaskOptions(folder, limit=1)).items) == 1
    asked = gsm8k.load(TaskOptions(folder, settings={"prompt": "ask"}))
    assert asked.chat and str(asked.items[1].prompt).startswith("test?\n")


def test_examples_of_reasoning(folder):
    task = gsm8k.load(TaskOptions(folder, shots=2))
    assert task.items[1].prompt == (
        "Q: What is {x} times 2, for x = 600?\nA: It is 600*2 = $1200.\nThe answer is: 1200\n\n"
        "Q: train?\nA: It is 600*2 = $1200.\nThe answer is: 1200\n\n"
        "Q: test?\nA:"
    )
    assert task.stops == ("\nQ:",)
    # Where the model goes on with an example of its own.
    answer = until_stop(" 5 and 7.\nThe answer is: 12\n\nQ: next?\nA: 9", task.stops)
    assert gsm8k.flexible(answer) == gsm8k.strict(answer) == "12"


def test_each_form_has_stops_of_its_own(folder):
    steps = "### Step 1\n5 + 7\n\n### Result\nThe answer is: 12"
    ask = gsm8k.load(TaskOptions(folder, settings={"prompt": "ask"}))
    assert until_stop(steps, ask.stops) == until_stop(steps, ask.chat_stops) == steps
    alpaca = gsm8k.load(TaskOptions(folder))
    assert until_stop("It is 7.\n### Instruction:\n8", alpaca.stops) == "It is 7."


def test_summary_has_both_extractions(folder):
    task = gsm8k.load(TaskOptions(folder, settings={"extraction": "flexible"}))
    answers = ["The answer is: 1,200", "so 1200"]
    results = [(i, a, task.score(i, a)) for i, a in zip(task.items, answers, strict=True)]
    assert [score for *_, score in results] == [1, 1]
    assert task.summary is not None
    found = task.summary(results)
    assert (found["strict"], found["flexible"]) == (0.5, 1.0)
    assert found["strict_standard_error"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": {"prompt": "cot"}}, "prompt=cot, expected one of alpaca, ask"),
        ({"settings": {"extraction": "x"}}, "extraction=x"),
        ({"settings": {"max_new_tokens": "0"}}, "max_new_tokens=0"),
        ({"settings": {"samples": "2"}}, "unknown setting 'samples'"),
        ({"shots": -1}, "got -1 shots"),
    ],
)
def test_wrong_options(folder, options, message):
    with pytest.raises(ValueError, match=message):
        gsm8k.load(TaskOptions(folder, **options))


def test_rows_without_a_number():
    for answer in ("It is 5.", "#### five"):
        with pytest.raises(ValueError, match=r"line 3: .*expected '#### N'"):
            gsm8k.gold(Row("a.jsonl, line 3", {"answer": answer}))


@pytest.mark.data
@pytest.mark.parametrize("extraction", gsm8k.EXTRACTIONS)
def test_every_gold_answer_scores_one_and_a_changed_digit_none(data_dir, extraction):
    task = gsm8k.load(TaskOptions(data_dir, settings={"extraction": extraction}))
    assert len(task.items) == 1319
    for item in task.items:
        (number,) = item.references
        changed = number[:-1] + str((int(number[-1]) + 1) % 10)
        assert task.score(item, f"First 2.\n#### {number}\nThe answer is: {number}") == 1
        assert task.score(item, f"First 2.\n#### {changed}\nThe answer is: {changed}") == 0


@pytest.mark.data
def test_every_solution_of_the_test_set_scores_one(data_dir):
    """As the examples write them, annotations and all dropped."""
    rows = named_rows(data_dir, "gsm8k/test", gsm8k.HUB, "test")
    for row in rows:
        item = Item("0", "", (gsm8k.gold(row),), 1)
        written = gsm8k.example(row)
        assert "<<" not in written and "####" not in written
        assert gsm8k.score_strict(item, written) == gsm8k.score_flexible(item, written) == 1


@pytest.mark.data
def test_eight_shots_of_real_rows(data_dir):
    task = gsm8k.load(TaskOptions(data_dir, shots=8, limit=1))
    prompt = str(task.items[0].prompt)
    assert prompt.count("Q: ") == 9 and prompt.count("The answer is: ") == 8
    assert prompt.endswith("\nA:")
