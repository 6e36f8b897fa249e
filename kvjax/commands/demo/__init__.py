"""`kvjax demo`: what a smaller cache costs one model, in a few minutes.

There is one page for models that write English, and one for the embedded model's small language.
Both share their steps, the comparison of policies and the pictures (`shared`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from kvjax.chat import has_chat_template
from kvjax.checks import COUNT, SEED, check_ranges, optional
from kvjax.commands.demo import english, words
from kvjax.commands.demo.shared import Steps, Subject
from kvjax.extras import pyplot
from kvjax.hf import load, load_tokenizer
from kvjax.hf.source import gguf_file, resolve
from kvjax.tasks.english import ENGLISH
from kvjax.tasks.recall import language_of
from kvjax.tasks.words import TokenizerVocabulary

EMBEDDED = "builtin:needle"
REAL = "builtin:smollm2"
RANGES = {"samples": optional(COUNT), "seed": SEED}


def run_demo(
    out: Path, model: str | None = None, samples: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Runs every part, prints one page, and writes report.json and pictures into `out`.

    Args:
        model: a checkpoint; None for SmolLM2-135M if its package is installed, otherwise for the
            embedded model.
        samples: prompts per task; each policy at each size answers all of them. None for the
            page's own number.
        seed: of the prompts.

    Returns:
        The content of report.json.

    Raises:
        ValueError: fewer than one sample, a negative seed, a checkpoint that cannot be read, a
            tokenizer that can write none of the texts, or matplotlib is not installed.
    """
    check_ranges({"samples": samples, "seed": seed}, RANGES)
    pyplot()
    steps = Steps()
    name = default_model() if model is None else model
    with steps.step(f"load {name}"):
        tokenizer = load_tokenizer(name)
        vocab = TokenizerVocabulary(tokenizer, has_chat_template(tokenizer))
        page = english if language_of(vocab) is ENGLISH else words
        subject = Subject(name, *load(name, dtype=page.DTYPE), tokenizer, vocab)
    out.mkdir(parents=True, exist_ok=True)
    return page.show(subject, out, page.SAMPLES if samples is None else samples, seed, steps)


def default_model() -> str:
    """SmolLM2-135M where its package is installed, otherwise the embedded model, with a line."""
    try:
        gguf_file(resolve(REAL))
    except ValueError as error:
        Console(soft_wrap=True, highlight=False).print(
            f"This is the embedded model, which writes 512 words: {error}", markup=False
        )
        return EMBEDDED
    return REAL
