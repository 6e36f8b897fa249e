"""Needle in a haystack: one fact, somewhere in a long text, and a question about it."""

from eval.reads import Reads
from eval.task import Task, TaskOptions
from eval.tasks import grid
from kvjax.tasks import needle


def load(options: TaskOptions) -> Task:
    """See `eval.tasks.grid.load`; with distractors=5 it is the multi-key needle."""
    return grid.load("needle", needle.generate, options)


def reads(options: TaskOptions) -> Reads:
    """See `eval.tasks.grid`."""
    return grid.READS
