"""HumanEval (Chen et al. 2021): functions completed from signature and docstring."""

from __future__ import annotations

from eval import code_tasks
from eval.reads import Reads, check
from eval.task import Item, Task, TaskOptions
from eval.tasks import named_rows

STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Where a completion has left the function's body (Chen et al., section 2.2)."""

FILE, HUB = "humaneval/HumanEval", ("openai/openai_humaneval", "openai_humaneval")


def reads(options: TaskOptions) -> Reads:
    """Which problems to take, and how they are judged."""
    return Reads(("data_dir", "limit"), code_tasks.SETTINGS, code_tasks.SCORING)


def load(options: TaskOptions) -> Task:
    """The 164 problems, with as many samples each as asked for.

    Settings: samples (1), timeout (10 seconds), max_new_tokens (512), unsafe (0).

    Raises:
        ValueError: no data, a wrong setting, or no sandbox.
    """
    check("humaneval", options, reads(options))
    length = code_tasks.positive(options, "max_new_tokens", "512")
    rows = named_rows.read(options.data_dir, FILE, HUB, "test")[: options.limit]
    problems = [
        Item(
            id=row.text("task_id"),
            prompt=row.text("prompt"),
            references=(row.text("canonical_solution"),),
            max_new_tokens=length,
            meta={"test": row.text("test"), "entry_point": row.text("entry_point")},
        )
        for row in rows
    ]
    return Task(
        name="humaneval",
        items=code_tasks.with_samples(problems, options),
        score=code_tasks.judge(program, options),
        metric=code_tasks.METRIC,
        stops=STOPS,
        truncate="left",
        chat=False,
        raw="they are code to be completed, expected no --chat",
        summary=code_tasks.summary,
    )


def program(item: Item, answer: str) -> str:
    """Prompt, completion, the problem's tests, and a call of them."""
    test, entry_point = item.meta["test"], item.meta["entry_point"]
    return f"{item.prompt}{answer}\n{test}\ncheck({entry_point})\n"
