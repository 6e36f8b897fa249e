"""The directory that a conversion writes layer by layer, and how a stopped conversion continues.

While the conversion is unfinished, one more file is in the directory. That file holds the request,
the attention of the finished layers, and the residual streams after the last finished layer; the
next layer starts from these streams. The file is replaced in one step after each layer. A layer
that the file does not count is written again.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.checkpoint_files import NewTensor, map_file, read_head, write_file
from kvjax.config import AttentionConfig
from kvjax.endings import say_finished
from kvjax.fields import Text, refuse, violations, within
from kvjax.folders import MADE, made, record_made, sync_all
from kvjax.hf import native
from kvjax.hf.source import CONFIG, PARAMS, copy_companions
from kvjax.identity import identity
from kvjax.nn import Transformer
from kvjax.paths import clear_parts, is_part
from kvjax.runs import check_same
from kvjax.text_files import parse_json, parse_object

FILE = "unfinished.safetensors"
METADATA: dict[str, Any] = dict.fromkeys(("request", "attention", "other"), Text)
"""Texts in the header of the file: JSON of the request, and of the attention of the layers."""
OTHER = "other"
"""The folder of a second form of every layer, until one of the two is chosen."""
REPEAT = "repeat that command to finish it"
"""Advice for a directory or file that holds a run with other settings."""


@dataclass(frozen=True)
class Finished:
    """The part of a conversion that is done.

    Attributes:
        attention: the new attention of each written layer, in order.
        other: that of the other form of each layer, where two are kept; see `write_layer`.
        streams: residual streams [S, T, D] after the last written layer, by name.
    """

    attention: tuple[AttentionConfig, ...] = ()
    other: tuple[AttentionConfig, ...] = ()
    streams: Mapping[str, jax.Array] = field(default_factory=dict)


class ConversionFolder:
    """The directory that a conversion writes. Nothing changes on disk before the first layer.

    Use it as a context manager: a ValueError means that the conversion was refused, and then the
    folder removes everything that this run wrote. After any other error the next run continues.
    """

    def __init__(self, out: Path, request: Mapping[str, Any]):
        """Reads how far an earlier run came.

        Args:
            request: everything that the result depends on, as JSON values.

        Raises:
            ValueError: the directory is not empty, or holds a conversion with other settings.
        """
        self.out, self.request = out, dict(request)
        self.finished = _read(out, self.request)
        self._existed, self._resumed = out.exists(), (out / FILE).exists()
        self._begun = False

    def __enter__(self) -> ConversionFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # What an earlier run wrote stays: that run was not refused.
        if kind is None or not issubclass(kind, ValueError) or not self._begun or self._resumed:
            return
        for folder in (PARAMS, OTHER):
            shutil.rmtree(self.out / folder, ignore_errors=True)
        (self.out / FILE).unlink(missing_ok=True)
        clear_parts(self.out / FILE)
        if not self._existed:
            self.out.rmdir()

    def write_layer(
        self,
        params: Any,
        attention: AttentionConfig,
        streams: Mapping[str, jax.Array],
        other: tuple[Any, AttentionConfig] | None = None,
    ) -> None:
        """Writes the next layer.

        Args:
            params: the layer's parameters.
            streams: residual streams after this layer; a later run finds them in `finished`.
            other: parameters and attention of another form of the layer, for `take_other`. It
                needs the layer's size on disk until the conversion is complete.
        """
        self._begin()
        # The layer is on disk before the progress file counts it.
        done, others = self.finished.attention, self.finished.other
        name = f"layers_{len(done)}"
        native.write_part(self.out, name, params)
        if other is not None:
            shutil.rmtree(self.out / OTHER / PARAMS / name, ignore_errors=True)
            native.write_part(self.out / OTHER, name, other[0])
            others = (*others, other[1])
        self.finished = Finished((*done, attention), others, streams)
        self._write_progress()
        trim_memory()

    def write_part(self, name: str, value: Any) -> None:
        """Writes a parameter outside the layers. A run that continues writes it again."""
        self._begin()
        native.write_part(self.out, name, value)

    def take_other(self, first: int) -> None:
        """Replaces the layers from `first` on by their other form. A later run may repeat it."""
        for index in range(first, len(self.finished.attention)):
            new = self.out / OTHER / PARAMS / f"layers_{index}"
            if new.exists():
                shutil.rmtree(self.out / PARAMS / new.name, ignore_errors=True)
                new.rename(self.out / PARAMS / new.name)
        attention = self.finished.attention[:first] + self.finished.other[first:]
        self.finished = dataclasses.replace(self.finished, attention=attention)

    def converted(self, model: Transformer) -> Transformer:
        """The new model, for the original one."""
        return Transformer(model.config.with_attention(self.finished.attention))

    def complete(self, model: Transformer, source: str, report: Mapping[str, Any]) -> None:
        """Writes the report, the source's companion files and, as the last one, the configuration.

        Args:
            model: the new model.
            source: directory or GGUF file of the original one, which the files are copied from.
            report: for a repetition of the command, see `kvjax.folders.made`.
        """
        copy_companions(Path(source), self.out)
        record_made(self.out, self.request, report)
        sync_all(self.out)
        native.write_config(model, self.out)
        shutil.rmtree(self.out / OTHER, ignore_errors=True)
        (self.out / FILE).unlink()

    def _begin(self) -> None:
        """Before the first write: removes every part that is not finished."""
        if self._begun:
            return
        self._begun = True
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / CONFIG).unlink(missing_ok=True)
        finished = {f"layers_{i}" for i in range(len(self.finished.attention))}
        params = self.out / PARAMS
        for part in params.iterdir() if params.exists() else ():
            # This also removes temporary directories that orbax left under other names.
            if part.name not in finished:
                shutil.rmtree(part)
        if not self._resumed:
            self._write_progress()

    def _write_progress(self) -> None:
        metadata = {
            "request": json.dumps(self.request),
            "attention": json.dumps([native.encode(c) for c in self.finished.attention]),
            "other": json.dumps([native.encode(c) for c in self.finished.other]),
        }
        tensors = [_tensor(name, x) for name, x in self.finished.streams.items()]
        write_file(self.out / FILE, tensors, metadata)


def finished_report(out: Path, request: Mapping[str, Any]) -> dict[str, Any] | None:
    """The report of the same conversion if it is finished, with a line that says so; else None.

    Raises:
        ValueError: the directory holds a finished conversion with other settings.
    """
    report = made(out, request)
    if report is not None:
        # A kill may have come after the configuration was written.
        shutil.rmtree(out / OTHER, ignore_errors=True)
        (out / FILE).unlink(missing_ok=True)
        say_finished(out)
    return report


def check_out(out: Path) -> None:
    """Refuses a directory that holds something else; call this before you read weights.

    Raises:
        ValueError: `out` has files, but no conversion.
    """
    present = {path.name for path in out.iterdir()} if out.exists() else set()
    known = FILE in present or {MADE, CONFIG} <= present
    if not known and not all(is_part(name, FILE) for name in present):
        raise ValueError(f"{out} is not empty, expected a new directory")


def describe(model: Transformer, params: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The part of a request that identifies the original model. Reads every weight once."""
    raw = {**native.encode(model.config), "source": ""}
    digest = hashlib.sha256(json.dumps(raw).encode()).hexdigest()[:12]
    weights = identity(model.config, params).digest
    name = Path(model.config.source).name
    return {"model": name, "config": digest, "dtype": dtype, "weights": weights}


def _read(out: Path, request: dict[str, Any]) -> Finished:
    check_out(out)
    path = out / FILE
    if not path.exists():
        return Finished()
    with within(f"{path} does not belong to a conversion"):
        tensors, metadata = read_head(path)
        refuse(line for _, line in violations(metadata, METADATA, required=True))
        earlier = parse_object(metadata["request"].encode(), "its request")
        configs, others = (_attention(metadata[name], name) for name in ("attention", "other"))
    held = f"{out} holds an unfinished conversion with other settings"
    check_same(earlier, request, held, f"{REPEAT}, or remove the directory to start over")
    file = map_file(path)
    return Finished(configs, others, {name: jnp.array(t.view(file)) for name, t in tensors.items()})


def _attention(text: str, name: str) -> tuple[AttentionConfig, ...]:
    value = parse_json(text.encode(), f"its {name}")
    refuse(native.part_problems(value, tuple[AttentionConfig, ...], name))
    return native.decode(value)


def _tensor(name: str, x: jax.Array) -> NewTensor:
    return NewTensor(name, np.dtype(x.dtype), x.shape, lambda: np.asarray(x))


def trim_memory() -> None:
    """Returns freed memory to the system, where the C library has a call for that.

    glibc keeps freed arrays of a few MB in one pool per thread. Without this call these pools grow
    by about 50 MB with every layer of a 14B model that is converted.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
