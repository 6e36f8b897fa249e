"""Named sets of examples, apart from what training draws."""

from collections.abc import Callable

import numpy as np

from kvjax.example import Example
from kvjax.tasks import needle, repeated_spans, two_hop
from kvjax.tasks.vocabulary import Vocabulary

EVALUATION_STREAM = 1_000_003
"""First number of the seeds of evaluation; pretraining's seeds begin with the recipe's seed."""


def _multi_key(rng, vocab, length, answer_length):
    return needle.generate(rng, vocab, length, answer_length, distractors=5)


def _two_hop_crowded(rng, vocab, length, answer_length):
    return two_hop.generate(rng, vocab, length, answer_length, distractors=3)


TASKS: dict[str, Callable[..., Example]] = {
    "needle": needle.generate,
    "multi_key": _multi_key,
    "two_hop": two_hop.generate,
    "two_hop_crowded": _two_hop_crowded,
    "repeated_spans": repeated_spans.generate,
}

CHANCE = {"needle": 1.0, "multi_key": 1 / 6, "two_hop": 1 / 2, "two_hop_crowded": 1 / 2}
"""How often one is right who copies one of the candidates without knowing which: of a needle there
is only one, so a model that finds any favorite thing is right."""


def make_examples(
    task: str,
    vocab: Vocabulary,
    count: int,
    length: int,
    seed: int = 0,
    answer_lengths: tuple[int, int] = (1, 12),
) -> list[Example]:
    """Examples of one of TASKS, with answers of random lengths.

    Args:
        length: tokens of every prompt.
        answer_lengths: least and largest number of words of the answers.

    Raises:
        ValueError: an unknown task.
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r}, expected one of {', '.join(TASKS)}")
    rng = np.random.default_rng([EVALUATION_STREAM, seed, length])
    low, high = answer_lengths
    return [TASKS[task](rng, vocab, length, int(rng.integers(low, high + 1))) for _ in range(count)]
