"""Counts what jax traces, lowers and compiles, for tests of how many programs there are."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.compile_spans import Span, watched


@dataclass(frozen=True)
class Compilations:
    """The programs of a `counted` context, by name; a list grows while the context is open.

    A program that jax has in memory appears nowhere.
    """

    spans: list[Span]

    @property
    def traced(self) -> list[str]:
        """Functions that became jaxprs; inner jits are a part of the function that calls them."""
        return self._names("trace")

    @property
    def lowered(self) -> list[str]:
        """Programs that became StableHLO."""
        return self._names("lower")

    @property
    def compiled(self) -> list[str]:
        """Programs that XLA compiled."""
        return self._names("compile")

    @property
    def from_cache(self) -> list[str]:
        """Programs that the persistent cache had, so that XLA compiled nothing."""
        return self._names("read")

    def _names(self, stage: str) -> list[str]:
        return [span.name for span in self.spans if span.stage == stage]


@contextlib.contextmanager
def counted() -> Iterator[Compilations]:
    """Programs that are traced, lowered and compiled in this context.

    >>> with counted() as programs:
    ...     generate(…)
    >>> assert programs.compiled == []
    """
    with watched() as spans:
        yield Compilations(spans)
