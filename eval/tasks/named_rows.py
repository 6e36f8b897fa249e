"""The rows of a data set that is one file a split, in a folder of its own or not."""

from __future__ import annotations

from pathlib import Path

from eval import rows


def read(folder: Path | None, name: str, hub: tuple[str, str], split: str) -> list[rows.Row]:
    """All rows.

    Args:
        folder: has `name`.jsonl, as it is or packed, or its last part; None: the hub dataset.
        name: like "gsm8k/test".
        hub: dataset and configuration.
        split: of the dataset.

    Raises:
        ValueError: see `eval.rows`.
    """
    if folder is None:
        return rows.hub_rows(*hub, split)
    kinds = (".jsonl",)
    path = rows.look(folder, name, kinds)
    return rows.read_rows(path or rows.find(folder, Path(name).name, kinds, of=f"{name} or that"))
