"""GSM8K (Cobbe et al. 2021): word problems with one number for an answer; 1319 of them."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from eval.metrics import plain
from eval.results import standard_error
from eval.rows import Row, named_rows
from eval.task import Item, Reads, Task, TaskOptions, check_options, chosen

ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{question}\n\n### Response: Let's think step by step."
)
"""MetaMath's prompt (Yu et al. 2023); its models end with "The answer is: " and the number."""

ASK = "{question}\nThink step by step, and end with a line 'The answer is: ' and the number."
"""For chat models, inside their template."""

HUB = ("openai/gsm8k", "main")
CURRENCY = "$€£¥₹"
WHOLE = r"(?:\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)|\d+),?"
NUMBER = rf"[-+]?(?:[{CURRENCY}] {{0,9}}){{0,9}}-?(?:{WHOLE}(?:\.\d+)?|\.\d+)(?:/\d+)?"
"""A number in the text that `plain` gives; a comma belongs to it before three digits."""
UNIT_POWER = re.compile(r"(?<=[A-Za-z])\s*\^\s*(?:\{\s*)?-?\d+")
"""The power of a unit, as the 2 in "36 m^2", is not an answer."""
SETTINGS = ("prompt", "extraction", "max_new_tokens")
SCORING = ("extraction",)
PROMPTS = ("alpaca", "ask")
EXTRACTIONS = ("strict", "flexible")


def reads(options: TaskOptions) -> Reads:
    """The options and settings of GSM8K. Examples fix the prompt, so `prompt` needs --shots 0."""
    names = ("data_dir", "limit", "shots")
    if options.shots:
        return Reads(names, SETTINGS[1:], SCORING, why="prompt is for --shots 0")
    return Reads(names, SETTINGS, SCORING)


def load(options: TaskOptions) -> Task:
    """Zero-shot with MetaMath's prompt, or with `shots` examples of reasoning (8 are usual).

    The examples are the first rows of the training set, whose solutions are part of the data. The
    usual prompt for chains of thought (Wei et al. 2022) has eight other examples, so scores differ
    a little from those that are reported with that prompt.

    Settings: prompt, zero-shot only: "alpaca" or "ask" (for chat models). extraction: "strict" (the
    number after "The answer is") or "flexible" (the last number); the summary has both scores.
    max_new_tokens (512).

    Raises:
        ValueError: no data, or a wrong setting.
    """
    check_options("gsm8k", options, reads(options))
    prompt = chosen(options, "prompt", PROMPTS)
    extraction = chosen(options, "extraction", EXTRACTIONS)
    length = options.settings.get("max_new_tokens", "512")
    if not length.isdecimal() or int(length) < 1:
        raise ValueError(f"max_new_tokens={length}, expected a number above 0")
    shots = options.shots or 0
    if shots < 0:
        raise ValueError(f"got {shots} shots, expected 0 or more")
    examples = ""
    if shots:
        rows = named_rows(options.data_dir, "gsm8k/train", HUB, "train")[:shots]
        if len(rows) < shots:
            raise ValueError(f"got {shots} shots, expected ≤ {len(rows)}: rows of gsm8k/train")
        examples = "".join(map(example, rows))
    rows = named_rows(options.data_dir, "gsm8k/test", HUB, "test")
    # The form of the prompt: examples fix it, otherwise the setting chooses.
    template = "{question}" if shots else {"alpaca": ALPACA, "ask": ASK}[prompt]
    if shots:
        template = "Q: {question}\nA:"
    items = tuple(
        Item(
            id=f"gsm8k/{number}",
            # replace instead of format: questions contain braces.
            prompt=examples + template.replace("{question}", row.text("question")),
            references=(gold(row),),
            max_new_tokens=int(length),
        )
        for number, row in enumerate(rows[: options.limit])
    )
    return Task(
        name="gsm8k",
        items=items,
        score=score_strict if extraction == "strict" else score_flexible,
        metric="exact_match",
        stops=_stops(shots, prompt),
        truncate="left",
        chat=not shots and prompt == "ask",
        raw=f"{'examples are' if shots else 'MetaMath has'} raw text, expected --set prompt=ask"
        + " without --shots" * bool(shots),
        summary=summary,
    )


def gold(row: Row) -> str:
    """The number after "####", without commas.

    Raises:
        ValueError: the answer has no such number.
    """
    answer = row.text("answer")
    _, mark, number = answer.rpartition("####")
    number = number.strip().replace(",", "")
    if not mark or value(number) is None:
        raise ValueError(f"{row.where}: got an answer ending {answer[-20:]!r}, expected '#### N'")
    return number


def example(row: Row) -> str:
    """A row of the training set as question and answer, without calculator annotations."""
    # The data marks calculations as <<48/2=24>>, which a model should not learn to write.
    reasoning = re.sub(r"<<.*?>>", "", row.text("answer")).rpartition("####")[0].strip()
    return f"Q: {row.text('question')}\nA: {reasoning}\nThe answer is: {gold(row)}\n\n"


def strict(answer: str) -> str | None:
    """The number right after the last "The answer is", with or without a colon.

    Markdown and LaTeX around the number do not matter, see `eval.metrics.plain`.
    """
    found = re.findall(rf"[Tt]he answer is\s*(?::\s*)?({NUMBER})", plain(answer, spaces=True))
    return found[-1] if found else None


def flexible(answer: str) -> str | None:
    """The last number of an answer, except for powers of units."""
    text = UNIT_POWER.sub("", plain(answer, spaces=True))
    found = re.findall(rf"(?<![\w.]){NUMBER}", text)
    return found[-1] if found else None


def value(number: str | None) -> Fraction | None:
    """The value of a written number, such as "$1,234.50", "-3" or "1/2"; None for other texts."""
    try:
        return Fraction(re.sub(rf"[{CURRENCY},\s]", "", plain(number or "", spaces=True)))
    except (ValueError, ZeroDivisionError):
        return None


def score_strict(item: Item, answer: str) -> float:
    return _equal(strict(answer), item)


def score_flexible(item: Item, answer: str) -> float:
    return _equal(flexible(answer), item)


def summary(results: list[tuple[Item, str, float]]) -> dict[str, Any]:
    """The scores of both extractions, each with its standard error."""
    found: dict[str, Any] = {}
    for name, score in (("strict", score_strict), ("flexible", score_flexible)):
        scores = [score(item, answer) for item, answer, _ in results]
        found[name] = sum(scores) / len(scores) if scores else None
        found[f"{name}_standard_error"] = standard_error(scores) if len(scores) > 1 else None
    return found


def _equal(number: str | None, item: Item) -> float:
    found = value(number)
    return float(found is not None and found == value(item.references[0]))


def _stops(shots: int, prompt: str) -> tuple[str, ...]:
    """Texts that begin the next example or instruction of a raw prompt; "ask" has none."""
    if shots:
        return ("\nQ:",)
    return ("\n### ",) if prompt == "alpaca" else ()
