"""LongChat's line retrieval: the answer is the number in one of hundreds of lines.

From D. Li et al., "How Long Can Open-Source LLMs Truly Promise on Context Length?" (2023). Rows of
DATA_DIR/longchat/lines_N.jsonl (or .gz, .xz) hold the prompts; there is no hub dataset. `lengths`
are numbers of lines; each is a group.

An answer's first line with a number counts: its last number must be the expected one. The benchmark
takes the last number of the whole answer, which is the same for models that stop.
"""

from __future__ import annotations

import re
from pathlib import Path

from eval import rows
from eval.metrics import whole_numbers
from eval.task import Item, Reads, Task, TaskOptions, check_options

MAX_NEW_TOKENS = 32
NAME = re.compile(r"lines_(\d+)\.jsonl(?:\.gz|\.xz)?")


def reads(options: TaskOptions) -> Reads:
    """The options that LongChat reads."""
    return Reads(("data_dir", "limit", "lengths"))


def load(options: TaskOptions) -> Task:
    """The rows of all files, or of the files with the given numbers of lines.

    Raises:
        ValueError: no such files, or a row without prompt or number.
    """
    check_options("longchat", options, reads(options))
    if options.data_dir is None:
        raise ValueError("longchat has no hub dataset: give --data-dir with longchat/lines_N.jsonl")
    folder = Path(options.data_dir) / "longchat"
    names = [name for path in folder.glob("lines_*") if (name := NAME.fullmatch(path.name))]
    # A packed and a plain file of one length are one group.
    counts = options.lengths or sorted({int(name[1]) for name in names})
    if not counts:
        raise ValueError(f"no {folder / 'lines_N.jsonl'} (nor .gz, .xz): expected LongChat's rows")
    items: list[Item] = []
    for count in counts:
        path = rows.find(folder, f"lines_{count}", (".jsonl",), of=f"prompts of {count} lines")
        items += [
            Item(
                id=f"lines_{count}-{index}",
                prompt=row.text("prompt"),
                references=(_number(row),),
                max_new_tokens=MAX_NEW_TOKENS,
                group=f"lines_{count}",
            )
            for index, row in enumerate(rows.read_rows(path, options.limit))
        ]
    return Task("longchat", tuple(items), score, metric="exact_number")


def _number(row: rows.Row) -> str:
    number = str(row.value("expected_number"))
    if not number.isdecimal():
        raise ValueError(f"{row.where}: 'expected_number' is {number!r:.60}, expected digits")
    return number


def score(item: Item, answer: str) -> float:
    """Whether the answer's number is the reference."""
    numbers = next((found for line in answer.split("\n") if (found := whole_numbers(line))), [])
    return float(bool(numbers) and numbers[-1] == int(item.references[0]))
