"""Families of problems as files for fine-tuning, and the accuracy of a model on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kvjax
from kvjax.nn import Transformer
from kvjax.prompts import bucket_length
from kvjax.ranges import COUNT, SEED, check_ranges
from kvjax.tasks import WordVocabulary
from kvjax.tasks.families import rows
from kvjax.tasks.prompt import Problem


def write_rows(path: Path, family: str, count: int, seed: int = 0, split: str = "train") -> None:
    """Writes `kvjax.tasks.families.rows`, one JSON object a line.

    Raises:
        ValueError: an unknown family or split, a count below 1, or a negative seed.
    """
    check_ranges({"count": count, "seed": seed}, {"count": COUNT, "seed": SEED})
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) + "\n" for row in rows(family, count, seed, split)]
    path.write_text("".join(lines))


def family_accuracy(
    model: Transformer,
    params: Any,
    problems: Sequence[Problem],
    batch_size: int = 64,
    max_new_tokens: int = 32,
) -> tuple[float, float, list[str]]:
    """Share of problems that greedy decoding with the full cache solves.

    Every batch is full (the last one repeats its first prompt), so that each length bucket
    compiles once: two of them for the families of kvjax.

    Args:
        model: with the project's word vocabulary.
        batch_size: prompts at a time.

    Returns:
        Accuracy p, its standard error sqrt(p(1 − p)/n), and the text of each problem's answer.

    Raises:
        ValueError: no problems.
    """
    if not problems:
        raise ValueError("got no problems, expected at least one")
    vocab = WordVocabulary()
    prompts = [[vocab.bos_id, *vocab.encode(problem.query)] for problem in problems]
    texts = [""] * len(problems)
    for bucket in sorted({bucket_length(len(prompt)) for prompt in prompts}):
        indices = [i for i, prompt in enumerate(prompts) if bucket_length(len(prompt)) == bucket]
        fill = [indices[0]] * (-len(indices) % batch_size)
        chosen = [prompts[i] for i in (*indices, *fill)]
        out = kvjax.generate(
            model, params, chosen, max_new_tokens, eos_ids=[vocab.eos_id], batch_size=batch_size
        )
        for index, ids in zip(indices, out.tokens, strict=False):
            texts[index] = vocab.decode(ids)
    right = [problem.solved(text) for problem, text in zip(problems, texts, strict=True)]
    share = sum(right) / len(right)
    return share, (share * (1 - share) / len(right)) ** 0.5, texts
