"""What commands leave on disk: digests of files and arrays, and what was lost of older ones."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import kvjax
from kvjax.identity import identity
from kvjax.runs import whole_lines

TIMES = {"seconds", "date", "peak_memory_bytes", "tokens_per_second", "mfu", "computed", "command"}
"""Entries of reports and logs that differ between two runs of the same command."""
UNFINISHED = (".lock", ".part", ".kvjax-part", ".partial.jsonl", "unfinished.safetensors")
"""Ends of names that only an unfinished command leaves."""
GROWING = (".jsonl",)
ORBAX = {"params", "checkpoints", "damaged"}
"""Folders of orbax, whose files have new names and bytes each time; `arrays` looks into them."""


def content(out: Path) -> dict[str, str]:
    """A digest of every file that a command left, without what differs between equal runs."""
    return {
        str(path.relative_to(out)): digest
        for path in sorted(out.rglob("*"))
        if path.is_file() and not ORBAX & set(path.relative_to(out).parts)
        for digest in [_digest(path)]
    }


def _digest(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix == ".json":
        with contextlib.suppress(ValueError):  # a torn file is neither the old one nor the new one
            data = _timeless(json.loads(data))
    elif path.suffix == ".jsonl":  # a kill may tear the last line
        data = b"\n".join(_timeless(json.loads(line)) for line in whole_lines(path))
    elif path.suffix == ".png":
        data = b""
    return hashlib.sha256(data).hexdigest()[:12]


def _timeless(value: Any) -> bytes:
    return json.dumps(_without_times(value), sort_keys=True).encode()


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_times(v) for k, v in value.items() if k not in TIMES}
    return [_without_times(v) for v in value] if isinstance(value, list) else value


def arrays(out: Path) -> dict[str, str]:
    """A digest of the parameters of every model in the native layout, and names in orbax's folders.

    The names tell a leftover that no reader looks at.
    """
    found = {}
    for config in sorted(out.rglob("kvjax.json")):
        model, params = kvjax.load(config.parent, dtype="float32")
        found[str(config.parent.relative_to(out))] = identity(model.config, params).digest
    for folder in sorted(path for path in out.rglob("*") if path.name in ORBAX):
        found[str(folder.relative_to(out))] = " ".join(sorted(p.name for p in folder.iterdir()))
    return found


def lost(now: dict[str, str], old: dict[str, str], new: dict[str, str]) -> list[str]:
    """Names of files that are neither old nor new. Files that grow and leftovers do not count."""
    return [
        name
        for name, digest in now.items()
        if not name.endswith((*UNFINISHED, *GROWING))
        and not any(part.endswith(UNFINISHED) for part in Path(name).parts)
        and digest not in (old.get(name), new.get(name))
    ] + [name for name in old if name not in now]
