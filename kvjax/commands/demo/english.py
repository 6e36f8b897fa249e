"""The page of models that write English: answers, needles, and a conversion to half of the cache.

A part that a model cannot do is left out, with a line: the page is longer than the model's context,
or a layer has no grouped-query attention.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32
from rich.console import Console

from kvjax.commands.checkpoints import bytes_per_token
from kvjax.commands.demo import answers, shared
from kvjax.commands.demo.shared import Steps, Subject
from kvjax.config import GQAConfig
from kvjax.headkv.measure import score_heads
from kvjax.policies.importance import HeadScores, default_scores
from kvjax.scoring import perplexity
from kvjax.tasks import make_examples
from kvjax.text import prompt_ids
from kvjax.transmla import BEST, calibrate, convert

PROMPT_LENGTH = 1024  # tokens of each needle's prompt
KV_SIZES = (24, 48, 96)
SAMPLES = 16
DTYPE = None  # bfloat16 on accelerators, float32 on CPUs
BATCH = 8
SCORE_SAMPLES, SCORE_LENGTH = 16, 512
"""Needles that importance is measured on for a model that brings no head scores."""
SEQUENCES, LENGTH = 16, 256
"""Most sequences that a conversion is calibrated on, and the tokens of each."""
RECIPE = dataclasses.replace(BEST, refit=False)
"""The closed form: the least squares after it would take longer than all the rest of the demo."""


def show(subject: Subject, out: Path, samples: int, seed: int, steps: Steps) -> dict[str, Any]:
    """Answers questions, hides needles, and converts the model; prints each part when it is done.

    Args:
        samples: needles; each policy at each size answers all of them.
        seed: of the needles.

    Returns:
        The content of report.json.
    """
    console = Console(highlight=False)
    report: dict[str, Any] = {"model": subject.name, "seed": seed}
    scores, origin = importance_of(subject, steps)
    scores.save(out / "heads.json")
    report |= {"about": shared.about(subject), "head_scores": origin}
    console.print(f"\n{report['about']}\nHead importance: {origin}.", markup=False)
    report |= page_part(subject, scores, steps, console)
    report |= needle_part(subject, scores, samples, seed, out, steps, console)
    report |= conversion_part(subject, steps, console)
    console.print()
    return shared.finish(report, out, steps, console)


def importance_of(subject: Subject, steps: Steps) -> tuple[HeadScores, str]:
    """The importance of the model's heads, and where it comes from.

    It comes with the model, or is measured here on needles. A model that finds no needle is
    measured by how its heads copy, which needs no right answers.
    """
    model, params, tokenizer = subject.model, subject.params, subject.tokenizer
    shipped = default_scores(model.config)
    if shipped is not None:
        return shipped, "the model's own head_scores.json"
    length = min(SCORE_LENGTH, model.config.context_length)
    measure = functools.partial(
        score_heads,
        model,
        params,
        tokenizer,
        samples=SCORE_SAMPLES,
        length=length,
        batch_size=BATCH,
    )
    with steps.step("head importance, which this model does not bring"):
        try:
            scores = measure("enhanced_retrieval")
        except ValueError:
            scores = measure("copying")
    kind = scores.meta["estimator"]
    return scores, f"measured here: estimator {kind}, {SCORE_SAMPLES} samples of ≤ {length} tokens"


def page_part(
    subject: Subject, scores: HeadScores, steps: Steps, console: Console
) -> dict[str, Any]:
    """Questions about a page of text, answered under four caches."""
    ids = answers.prompts(subject)
    longest, context = max(map(len, ids)), subject.model.config.context_length
    if longest + answers.TIMED_TOKENS > context:
        note = f"No questions: the page has {longest} tokens, and this model reads {context}."
        console.print(note)
        return {"page": note}
    console.print(
        f"\nThe model reads a page about a town, a question and the beginning of its answer, "
        f"{longest:,} tokens, and goes on from four caches: full keeps all keys and values, the "
        f"others {answers.SHARE:.0%} of the bytes. {shared.KEEPS}"
    )
    policies = answers.caches(subject, scores)
    found = answers.answer_questions(subject, policies, ids, steps)
    costs = answers.costs(subject, policies, ids[0], steps)
    answers.show_answers(found, {cost.policy: cost.cache_bytes for cost in costs}, console)
    console.print()
    console.print(answers.cost_table(found, costs))
    return {"prompt_tokens": longest, **answers.as_rows(found, costs)}


def needle_part(
    subject: Subject,
    scores: HeadScores,
    samples: int,
    seed: int,
    out: Path,
    steps: Steps,
    console: Console,
) -> dict[str, Any]:
    """Needles under every policy and KV size, and the pictures of accuracy and importance."""
    length = min(PROMPT_LENGTH, subject.model.config.context_length)
    console.print(
        f"\nTo measure: {samples} times a number of seven digits is hidden in {length:,} tokens of "
        "generated sentences, and the model is asked for it. Every digit must be right."
    )
    tasks = {"needle": make_examples("needle", subject.vocab, samples, length, seed)}
    outcomes = shared.compare_policies(subject, scores, tasks, KV_SIZES, steps, BATCH)
    shared.draw(outcomes, scores, length, out)
    importance = shared.describe_importance(scores)
    console.print()
    console.print(shared.accuracy_table(outcomes, "kv_size: tokens a head keeps, on average"))
    console.print(f"\n{shared.importance_line(importance)} heads.png shows all.")
    return {
        "prompt_length": length,
        "tasks": shared.as_rows(outcomes),
        "importance": importance,
    }


def conversion_part(subject: Subject, steps: Steps, console: Console) -> dict[str, Any]:
    """The second way to a smaller cache: latent attention, here with half of the numbers."""
    attentions = [layer.attention for layer in subject.model.config.layers]
    if not all(isinstance(attention, GQAConfig) for attention in attentions):
        note = "No conversion: this model has layers without grouped-query attention."
        console.print(f"\n{note}")
        return {"decoupled": note}
    row = convert_to_half(subject, steps)
    console.print(
        "\nThe other way to a smaller cache changes the weights: transmla turns keys and values "
        f"into one latent a layer. {row['bytes_per_token_before']:,} → "
        f"{row['bytes_per_token_after']:,} cache bytes a token; perplexity of "
        f"{row['test']} {row['perplexity_before']:.1f} → {row['perplexity_after']:.1f}. "
        f"Nothing is trained. It was calibrated on no more than {row['calibration']} of other "
        "chapters, in closed form; `kvjax convert` also fits the weights, on text of yours."
    )
    return {"decoupled": row}


def convert_to_half(subject: Subject, steps: Steps) -> dict[str, Any]:
    """Converts to half of the cache, and measures the perplexity of the page before and after."""
    model, params = subject.model, subject.params
    page, *others = answers.chapters()
    length = min(LENGTH, model.config.context_length)
    test = token_rows(subject, page, length)
    text = token_rows(subject, "\n\n".join(others), length)[:SEQUENCES]
    with steps.step(f"calibration on {len(text)} x {length} tokens", len(text)) as at:
        stats = calibrate(model, params, batches(text, at))
    with steps.step("conversion to latent attention", len(model.config.layers)) as at:
        new_model, new_params = convert(
            model,
            params,
            method="decoupled",
            stats=stats,
            cache=0.5,
            recipe=RECIPE,
            progress=lambda layer: at(layer.index + 1),
        )
    with steps.step("perplexity before and after"):
        before = perplexity(model, params, [test])
        after = perplexity(new_model, new_params, [test])
    dtype = params["embedding"].dtype.name
    kv_rank, rope_dim = new_model.config.layers[0].attention.cached_widths
    return {
        "calibration": f"{len(text)} x {length} tokens",
        "test": f"{len(test)} x {length} tokens of the page",
        "kv_rank": kv_rank,
        "rope_dim": rope_dim,
        "perplexity_before": before,
        "perplexity_after": after,
        "bytes_per_token_before": bytes_per_token(model, dtype),
        "bytes_per_token_after": bytes_per_token(new_model, dtype),
    }


def token_rows(subject: Subject, text: str, length: int) -> Int32[np.ndarray, "S T"]:
    """The ids of a text, one sequence a row; the rest that fills no row is left out."""
    ids = np.asarray(prompt_ids(subject.tokenizer, text), np.int32)
    return ids[: len(ids) // length * length].reshape(-1, length)


def batches(
    rows: Int32[np.ndarray, "S T"], at: Callable[[int], None]
) -> Iterator[Int32[np.ndarray, "B T"]]:
    """The rows, BATCH at a time; `at` is called with the number of rows that were taken."""
    for start in range(0, len(rows), BATCH):
        yield rows[start : start + BATCH]
        at(min(start + BATCH, len(rows)))
