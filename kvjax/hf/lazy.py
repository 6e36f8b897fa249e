"""Parameters that stay on disk until a part of them is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any


class LazyParams(Mapping[str, Any]):
    """The top level of a params dict; `params["layers_3"]` reads that layer, every time anew.

    What goes layer by layer (`kvjax.transmla.calibrate`, the conversion) holds one layer at a time
    this way.
    """

    def __init__(self, names: Iterable[str], read: Callable[[str], Any]):
        self._names, self._read = tuple(names), read

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
