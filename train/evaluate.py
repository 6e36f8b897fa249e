"""Accuracy of a trained model on prompts that training never drew."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import kvjax
from kvjax.ranges import COUNT, SEED, check_ranges
from kvjax.tasks import WordVocabulary, accuracy, make_examples
from kvjax.tasks.recall import TASKS


def evaluate(
    model: str,
    out: Path | None,
    tasks: tuple[str, ...],
    lengths: tuple[int, ...],
    count: int,
    dtype: str,
    seed: int = 0,
) -> list[dict]:
    """One row for each task and prompt length; exact match of whole answers of 1 to 12 tokens.

    Args:
        model: a directory, or "builtin:needle".
        out: JSON file for the rows; None for none.
        count: prompts a row.
        dtype: of the parameters.

    Raises:
        ValueError: a count or a length below 1, an unknown task, or no such model.
    """
    lengths_by_name = {f"lengths[{index}]": length for index, length in enumerate(lengths)}
    values = {"count": count, "seed": seed, **lengths_by_name}
    check_ranges(values, {"seed": SEED, **dict.fromkeys(("count", *lengths_by_name), COUNT)})
    transformer, params = kvjax.load(model, dtype=dtype)
    vocab = WordVocabulary()
    rows = []
    for task in tasks:
        for length in lengths:
            examples = make_examples(task, vocab, count, length, seed)
            row = {
                "task": task,
                "prompt_tokens": length,
                "prompts": count,
                "exact_match": accuracy(transformer, params, examples, vocab.eos_id),
                "chance": TASKS[task].chance,
                "dtype": dtype,
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        command = shlex.join(["python", "-m", "train", *sys.argv[1:]])
        result = {"model": model, "seed": seed, "command": command, "rows": rows}
        out.write_text(json.dumps(result, indent=2) + "\n")
    return rows
