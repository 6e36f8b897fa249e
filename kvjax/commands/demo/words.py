"""The page of the embedded model: exact answers in its own small language, and `equal_cache`.

The same page serves every model whose tokenizer writes that language and no English.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from kvjax.commands.checkpoints import bytes_per_token, logit_change
from kvjax.commands.demo import shared
from kvjax.commands.demo.shared import Steps, Subject
from kvjax.headkv.measure import score_heads
from kvjax.nn import Transformer
from kvjax.tasks import make_examples
from kvjax.transmla import convert

DTYPE = "float32"
PROMPT_LENGTH = 1024  # tokens of each question's prompt
SCORE_LENGTH = 512  # tokens of the longest prompt that head importance is measured on
TASKS = ("needle", "multi_key", "two_hop")
KV_SIZES = (16, 32, 64)
INITS = ("svd_global", "identity")
SAMPLES = 32


def show(subject: Subject, out: Path, samples: int, seed: int, steps: Steps) -> dict[str, Any]:
    """Measures head importance, answers questions under every policy, and converts the model.

    Args:
        samples: examples per task; each policy at each size answers all of them.
        seed: of the examples.

    Returns:
        The content of report.json.
    """
    model, params, console = subject.model, subject.params, Console(highlight=False)
    console.print(f"\n{shared.about(subject)}", markup=False)
    console.print(
        f"Facts are hidden in {PROMPT_LENGTH:,} tokens, and the model is asked for one of them. "
        f"full keeps all keys and values. The others keep few: {shared.KEEPS}"
    )
    # Head importance first: the policies share their budgets by it.
    with steps.step("head importance"):
        scores = score_heads(model, params, subject.tokenizer, samples=samples, length=SCORE_LENGTH)
        scores.save(out / "heads.json")
    tasks = {
        task: make_examples(task, subject.vocab, samples, PROMPT_LENGTH, seed) for task in TASKS
    }
    outcomes = shared.compare_policies(subject, scores, tasks, KV_SIZES, steps)
    with steps.step("equal_cache conversion"):
        conversions = [convert_and_compare(model, params, init) for init in INITS]
    shared.draw(outcomes, scores, PROMPT_LENGTH, out)
    importance = shared.describe_importance(scores)
    # Print the results on one page of the terminal.
    title = f"{subject.name}: exact match at {PROMPT_LENGTH} tokens"
    console.print()
    console.print(shared.accuracy_table(outcomes, title))
    console.print()
    console.print(shared.importance_line(importance))
    for row in conversions:
        console.print(
            f"equal_cache, {row['init']}: logits change by {row['relative_logit_change']:.1e} of "
            f"the largest; cache {row['bytes_per_token_before']} → "
            f"{row['bytes_per_token_after']} bytes per token."
        )
    report = {
        "model": subject.name,
        "prompt_length": PROMPT_LENGTH,
        "seed": seed,
        "tasks": shared.as_rows(outcomes),
        "importance": importance,
        "equal_cache": conversions,
    }
    return shared.finish(report, out, steps, console)


def convert_and_compare(model: Transformer, params: Any, init: str) -> dict[str, Any]:
    """Converts to an equal cache and measures the change, which is rounding only."""
    new_model, new_params = convert(model, params, method="equal_cache", init=init)
    return {
        "init": init,
        "relative_logit_change": logit_change(model, params, new_model, new_params),
        "bytes_per_token_before": bytes_per_token(model, DTYPE),
        "bytes_per_token_after": bytes_per_token(new_model, DTYPE),
    }
