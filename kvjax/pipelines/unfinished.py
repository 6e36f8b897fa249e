"""The directory that a conversion writes layer by layer, and goes on with after it was stopped.

Beside the parts lies one file, until all is written: the request, the attention of the layers
that are finished, and the residual streams behind them, from which the next layer goes on. It is
replaced in one step, after the layer itself; a part that it does not count is written again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.config import AttentionConfig
from kvjax.hf import native
from kvjax.hf.safetensors import NewTensor, map_file, read_header, read_metadata, write_file
from kvjax.identity import identity
from kvjax.nn import Transformer
from kvjax.pipelines.companions import copy_companions, trim_memory
from kvjax.pipelines.partial import differences

FILE = "unfinished.safetensors"
PART = f"{FILE}.part"


@dataclass(frozen=True)
class Finished:
    """How far a conversion has come.

    Attributes:
        attention: of the layers that are written.
        streams: residual streams [S, T, D] behind them, by name.
    """

    attention: tuple[AttentionConfig, ...] = ()
    streams: Mapping[str, jax.Array] = field(default_factory=dict)


class Output:
    """What a conversion writes to. Nothing is touched before the first layer comes.

    As a context: a ValueError, which refuses the conversion, takes back what this run has begun.
    """

    def __init__(self, out: Path, request: Mapping[str, Any]):
        """Finds out what is there already.

        Args:
            request: all that the result depends on, as JSON values.

        Raises:
            ValueError: a directory that is not empty, or a conversion with other settings.
        """
        self.out, self.request = out, dict(request)
        self.finished = _read(out, self.request)
        self._existed, self._resumed = out.exists(), (out / FILE).exists()
        self._begun = False

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or not issubclass(kind, ValueError) or not self._begun or self._resumed:
            return
        shutil.rmtree(self.out / native.PARAMS, ignore_errors=True)
        for name in (FILE, PART):
            (self.out / name).unlink(missing_ok=True)
        if not self._existed:
            self.out.rmdir()

    def write_layer(
        self, params: Any, attention: AttentionConfig, streams: Mapping[str, jax.Array]
    ) -> None:
        """Writes the next layer; `streams` are what follows it, and come back after a stop."""
        self._begin()
        done = self.finished.attention
        native.write_part(self.out, f"layers_{len(done)}", params)
        self.finished = Finished((*done, attention), streams)
        self._keep()
        trim_memory()

    def write_top(self, name: str, value: Any) -> None:
        """Writes a parameter that belongs to no layer; after a stop it is written again."""
        self._begin()
        native.write_part(self.out, name, value)

    def complete(self, model: Transformer, source: str) -> Transformer:
        """After all parts: companions of the source, the configuration. Returns the new model."""
        new = Transformer(model.config.with_attention(self.finished.attention))
        copy_companions(Path(source), self.out)
        native.write_config(new, self.out)
        (self.out / FILE).unlink()
        return new

    def _begin(self) -> None:
        """Leaves of the directory only what is finished."""
        if self._begun:
            return
        self._begun = True
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / native.CONFIG).unlink(missing_ok=True)
        finished = {f"layers_{i}" for i in range(len(self.finished.attention))}
        params = self.out / native.PARAMS
        for part in params.iterdir() if params.exists() else ():
            if part.name not in finished:  # also what orbax had begun under another name
                shutil.rmtree(part)
        if not self._resumed:
            self._keep()

    def _keep(self) -> None:
        metadata = {
            "request": json.dumps(self.request),
            "attention": json.dumps([native.encode(c) for c in self.finished.attention]),
        }
        tensors = [_tensor(name, x) for name, x in self.finished.streams.items()]
        write_file(self.out / PART, tensors, metadata)
        (self.out / PART).replace(self.out / FILE)


def describe(model: Transformer, params: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The part of a request that says what is converted; every weight is read once for it."""
    raw = {**native.encode(model.config), "source": ""}
    digest = hashlib.sha256(json.dumps(raw).encode()).hexdigest()[:12]
    weights = identity(model.config, params).digest
    name = Path(model.config.source).name
    return {"model": name, "config": digest, "dtype": dtype, "weights": weights}


def check_out(out: Path) -> None:
    """Raises ValueError for a directory that holds something else; before weights are read."""
    present = {path.name for path in out.iterdir()} if out.exists() else set()
    if FILE not in present and present - {PART}:
        raise ValueError(f"{out} is not empty, expected a new directory")


def _read(out: Path, request: dict[str, Any]) -> Finished:
    check_out(out)
    path = out / FILE
    if not path.exists():
        return Finished()
    try:
        tensors, metadata = read_header(path), read_metadata(path)
        other, attention = json.loads(metadata["request"]), json.loads(metadata["attention"])
        configs = tuple(native.decode(config) for config in attention)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is of no conversion: {error}") from None
    if other != request:
        raise ValueError(
            f"{out} holds an unfinished conversion with other settings "
            f"({differences(other, request)}): repeat that command to finish it, or remove the "
            "directory to start over"
        )
    file = map_file(path)
    return Finished(configs, {name: jnp.array(t.view(file)) for name, t in tensors.items()})


def _tensor(name: str, x: jax.Array) -> NewTensor:
    return NewTensor(name, np.dtype(x.dtype), x.shape, lambda: np.asarray(x))
