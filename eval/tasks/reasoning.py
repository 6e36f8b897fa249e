"""Reasoning in a haystack: the favorite thing of the older of two people (HeadKV, 3.1)."""

from eval.reads import Reads
from eval.task import Task, TaskOptions
from eval.tasks import grid
from kvjax.tasks import two_hop


def load(options: TaskOptions) -> Task:
    """See `eval.tasks.grid.load`; depth is that of the answer's sentence."""
    return grid.load("reasoning", two_hop.generate, options)


def reads(options: TaskOptions) -> Reads:
    """See `eval.tasks.grid`."""
    return grid.READS
