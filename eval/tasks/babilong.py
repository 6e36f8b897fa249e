"""BABILong: bAbI's reasoning tasks with their facts scattered in book text (arXiv 2406.10149).

Rows {input, question, target, task} come from DATA_DIR/babilong/babilong_4k.jsonl (or .gz, .xz) and
similar files; without --data-dir from the hub, where each task is a split instead of a column.
`lengths` are prompt lengths as the benchmark counts them (4096 or 4000: "4k"), by default all (on
the hub: up to 32k). `subsets` are tasks (qa1 … qa20), by default all. Groups are "4k/qa1".

The prompt is this project's: it describes the form of the task's answers and has no examples. So
numbers are comparable among policies and models here, not with the benchmark's few-shot prompts.
"""

from __future__ import annotations

import re
from pathlib import Path

from eval import rows
from eval.task import Item, Reads, Task, TaskOptions, check_options

HUB = "RMT-team/babilong"
MAX_NEW_TOKENS = 20
THOUSANDS = (0, 1, 2, 4, 8, 16, 32, 64, 128)
ON_HUB = THOUSANDS[:7]

PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
YES_NO = ("yes", "no")
LABELS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("qa1", "qa2", "qa3", "qa4", "qa11", "qa12", "qa13"), PLACES),
    "qa5": ("Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk"),
    **dict.fromkeys(("qa6", "qa9", "qa17", "qa18"), YES_NO),
    "qa7": ("none", "one", "two", "three"),
    "qa8": ("apple", "football", "milk", "nothing"),
    "qa10": ("yes", "no", "maybe"),
    "qa14": ("bedroom", "cinema", "kitchen", "office", "park", "school"),
    "qa15": ("cat", "mouse", "sheep", "wolf"),
    "qa16": ("gray", "green", "white", "yellow"),
    "qa19": tuple(f"{a},{b}" for a in "nesw" for b in "nesw"),
    "qa20": ("bedroom", "bored", "garden", "hungry", "kitchen", "thirsty", "tired"),
}
"""The words that answers of each task consist of."""

DIRECTION = re.compile(r"\b(?:north|east|south|west|[nesw])\b")

FORM = {
    "qa8": "If there are several, give them all, with commas between.",
    "qa19": "Give the two directions in order, with a comma between: n, e, s and w stand for "
    "north, east, south and west.",
}


def reads(options: TaskOptions) -> Reads:
    """The options that BABILong reads."""
    return Reads(("data_dir", "limit", "lengths", "subsets"))


def load(options: TaskOptions) -> Task:
    """The rows of the lengths and tasks.

    Raises:
        ValueError: an unknown length or task, a missing file, or a corrupt row.
    """
    check_options("babilong", options, reads(options))
    unknown = [name for name in options.subsets if name not in LABELS]
    if unknown:
        raise ValueError(f"BABILong has no {', '.join(unknown)}, expected some of qa1 … qa20")
    folder = None if options.data_dir is None else Path(options.data_dir) / "babilong"
    items: list[Item] = []
    for length in _lengths(options.lengths, folder):
        # Items are numbered within their task, so that --limit holds for each of them.
        seen: dict[str, int] = {}
        for task, row in _rows(length, folder, options.subsets):
            index = seen[task] = seen.get(task, -1) + 1
            if options.limit is None or index < options.limit:
                items.append(_item(length, task, index, row))
    return Task("babilong", tuple(items), score, metric="accuracy")


def score(item: Item, answer: str) -> float:
    """1 if the answer names the target and no other label, else 0.

    The answer's first line counts, up to its first full stop. The task's labels that are whole
    words in it must be the target, or all targets of a list. Labels that the question names do not
    count: they are never the target. The benchmark looks for labels anywhere in words ("no" in
    "know", "one" in "none"); this score does not.
    """
    task = item.meta["task"]
    said = answer.lower().strip().split("\n")[0].split(".")[0]
    if task == "qa19":  # directions in order, commas or not
        path = ",".join(direction[0] for direction in DIRECTION.findall(said))
        return float(path == item.references[0])
    labels = {label.lower() for label in LABELS[task]}
    named = _words(said) & labels - _words(item.meta["question"].lower())
    return float(named == set(item.references[0].lower().split(",")))


def _words(text: str) -> set[str]:
    return set(re.findall(r"[^\W_]+", text))


def _lengths(lengths: tuple[int, ...], folder: Path | None) -> list[str]:
    """Lengths as in file names: "4k"."""
    if not lengths:
        if folder is None:
            return [f"{k}k" for k in ON_HUB]
        found = [f"{k}k" for k in THOUSANDS if rows.look(folder, f"babilong_{k}k", (".jsonl",))]
        if not found:
            raise ValueError(f"no {folder / 'babilong_4k.jsonl'} or other length of BABILong")
        return found
    known = {k * unit: f"{k}k" for k in THOUSANDS for unit in (1000, 1024)}
    unknown = [str(length) for length in lengths if length not in known]
    if unknown:
        expected = ", ".join(str(k * 1024) for k in THOUSANDS)
        raise ValueError(f"BABILong has no length {', '.join(unknown)}, expected of {expected}")
    return [known[length] for length in lengths]


def _rows(length: str, folder: Path | None, subsets: tuple[str, ...]) -> list[tuple[str, rows.Row]]:
    if folder is None:
        tasks = subsets or tuple(f"qa{number}" for number in range(1, 11))
        return [(task, row) for task in tasks for row in rows.hub_rows(HUB, length, task)]
    path = rows.find(folder, f"babilong_{length}", (".jsonl",), of=f"BABILong at {length}")
    found = [(row.text("task"), row) for row in rows.read_rows(path)]
    lacking = [task for task in subsets if task not in {name for name, _ in found}]
    if lacking:
        raise ValueError(f"{path} has no rows of {', '.join(lacking)}")
    return [(task, row) for task, row in found if not subsets or task in subsets]


def _item(length: str, task: str, index: int, row: rows.Row) -> Item:
    if task not in LABELS:
        raise ValueError(f"{row.where}: task {task!r}, expected qa1 … qa20")
    question = row.text("question").strip()
    form = FORM.get(task, f"Answer with one of: {', '.join(LABELS[task])}.")
    prompt = (
        "Facts about people, animals and things are hidden in the text below, among passages that "
        "have nothing to do with them. Answer the question after the text from these facts.\n\n"
        f"Text:\n{row.text('input').strip()}\n\n{form} Give nothing but the answer.\n"
        f"Question: {question}\nAnswer:"
    )
    return Item(
        id=f"{length}-{task}-{index}",
        prompt=prompt,
        references=(row.text("target").strip(),),
        max_new_tokens=MAX_NEW_TOKENS,
        group=f"{length}/{task}",
        meta={"task": task, "question": question},
    )
