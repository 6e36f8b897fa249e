"""MBPP (Austin et al. 2021, "Program Synthesis with Large Language Models"): short functions from
a sentence and three assertions."""

from __future__ import annotations

from pathlib import Path

from eval import code_tasks
from eval.reads import Reads, check
from eval.rows import Row
from eval.task import Item, Task, TaskOptions
from eval.tasks import named_rows

FILE, HUB = "mbpp/mbpp", ("google-research-datasets/mbpp", "full")
TEST_IDS = range(11, 511)
SHOT_IDS = (2, 3, 4)
"""The problems of the paper's prompt (section 2.1); 11–510 are its test set."""

QUESTION = (
    "You are an expert Python programmer, and here is your task: {text} "
    "Your code should pass these tests:\n\n{tests}\n"
)
"""The prompt of the paper (section 3)."""

BEGIN, DONE = "[BEGIN]\n", "[DONE]"
STOPS = (DONE,)


def reads(options: TaskOptions) -> Reads:
    """Which problems to take, how many examples, and how answers are judged."""
    return Reads(("data_dir", "limit", "shots"), code_tasks.SETTINGS, code_tasks.SCORING)


def load(options: TaskOptions) -> Task:
    """The 500 test problems, three examples before each; `shots` 0 to 3.

    Without examples the prompt is the question alone, which suits chat models: their answer's
    first code block counts. With examples a model continues the text.

    Settings: samples (1), timeout (10 seconds), max_new_tokens (512), unsafe (0).

    Raises:
        ValueError: no data, a wrong setting, or no sandbox.
    """
    check("mbpp", options, reads(options))
    length = code_tasks.positive(options, "max_new_tokens", "512")
    shots = len(SHOT_IDS) if options.shots is None else options.shots
    if not 0 <= shots <= len(SHOT_IDS):
        raise ValueError(f"got {shots} shots, expected 0 to {len(SHOT_IDS)}")
    rows = {row.value("task_id"): row for row in _rows(options.data_dir)}
    lacking = [number for number in SHOT_IDS[:shots] if number not in rows]
    if lacking:
        raise ValueError(f"no row with task_id {lacking[0]}, expected it for the examples")
    examples = "".join(_example(rows[number]) for number in SHOT_IDS[:shots])
    wanted = [number for number in TEST_IDS if number in rows][: options.limit]
    problems = [
        Item(
            id=f"MBPP/{number}",
            prompt=examples + _question(rows[number]) + (BEGIN if shots else ""),
            references=(_code(rows[number]),),
            max_new_tokens=length,
            meta={
                "setup": rows[number].text("test_setup_code"),
                "tests": rows[number].texts("test_list"),
            },
        )
        for number in wanted
    ]
    return Task(
        name="mbpp",
        items=code_tasks.with_samples(problems, options),
        score=code_tasks.judge(program, options),
        metric=code_tasks.METRIC,
        stops=STOPS if shots else (),
        truncate="left",
        chat=not shots,
        raw="examples are raw text, expected --shots 0",
        summary=code_tasks.summary,
    )


def program(item: Item, answer: str) -> str:
    """The answer's code, the setup (which uses it), and the assertions."""
    code = code_tasks.fenced(answer).partition(BEGIN)
    code = (code[2] if code[1] else code[0]).partition(DONE)[0]
    return "\n".join((code, item.meta["setup"], *item.meta["tests"], ""))


def _rows(folder: Path | None) -> list[Row]:
    """A local file has all splits in one."""
    splits = ("prompt", "test") if folder is None else ("test",)
    return [row for split in splits for row in named_rows.read(folder, FILE, HUB, split)]


def _question(row: Row) -> str:
    return QUESTION.format(text=row.text("text"), tests="\n".join(row.texts("test_list")))


def _code(row: Row) -> str:
    return row.text("code").replace("\r\n", "\n").strip()


def _example(row: Row) -> str:
    return f"{_question(row)}{BEGIN}{_code(row)}\n{DONE}\n\n"
