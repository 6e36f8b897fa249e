"""Settings of a fine-tuning run, from flags, from a YAML file, or from both."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kvjax.checks import COUNT, NOT_NEGATIVE, POSITIVE, SHARE, Range, optional, out_of_range
from kvjax.hf import default_dtype
from kvjax.paths import local_path
from kvjax.sharding import parse_mesh
from train.data import DataConfig, SourceConfig
from train.data import config as data_config
from train.settings import read_dataclass

DECAY_RATE = Range(least=0, below=1)


RANGES = data_config.RANGES | {
    "accumulate": COUNT,
    "steps": optional(COUNT),
    "learning_rate": POSITIVE,
    "warmup": SHARE,
    "b1": DECAY_RATE,
    "b2": DECAY_RATE,
    "weight_decay": NOT_NEGATIVE,
    "clip": POSITIVE,
    "distill": NOT_NEGATIVE,
    "checkpoint_every": COUNT,
    "log_every": COUNT,
    "keep": COUNT,
}
"""Ranges of the numbers of a `TuneConfig`."""


CHOICES = data_config.CHOICES | {
    "dtype": (None, "bfloat16", "float32"),
    **dict.fromkeys(("remat", "merge", "tensorboard"), (False, True)),
}


@dataclass(frozen=True)
class TuneConfig:
    """Settings of a fine-tuning run.

    The defaults of batch, rate and epochs are those of TransMLA v1 and v2 according to an article;
    the authors' released scripts use 128 sequences a step and one epoch (see docs/finetuning.md).

    Attributes:
        model: checkpoint directory, .gguf file, hub id, or builtin:<name>; converted or not.
        data: sources as FORMAT:PATH or FORMAT:PATH@WEIGHT, e.g. metamath:meta.jsonl@0.5.
        tokenizer: directory or hub id of the tokenizer; None: that of the model.
        train: parameters to train: kv_only, attention, all, or patterns like "layers_*/attn/q".
        sequence_length: number of tokens of a packed row.
        batch_size: number of packed rows per step.
        accumulate: number of micro-batches per step.
        epochs: number of times that the data is seen; `steps` overrides it.
        template: auto (each format's own prompt) or chat (the tokenizer's chat template).
        learn: answers, or all tokens.
        long_rows: rows longer than a packed row are dropped (and counted), or truncated.
        max_rows: use at most this many rows of each source, from its beginning.
        learning_rate: peak; linear warm-up over `warmup` of the steps, then a cosine to zero.
        clip: largest gradient norm.
        dtype: of activations and frozen weights; trainable parameters are kept in fp32. None: see
            `kvjax.hf.default_dtype`.
        remat: compute activations again in the backward pass, layer by layer.
        teacher: the original model, for distillation.
        distill: weight of the KL divergence from the teacher.
        mesh: e.g. data=1,fsdp=4,tensor=2; a −1 takes all remaining devices. None: one device.
        checkpoint_every, log_every: numbers of steps.
        keep: number of checkpoints to keep.
        merge: write the whole fine-tuned model to OUT/model at the end.
        tensorboard: also write event files (needs the tensorboardX package).
    """

    model: str
    data: tuple[str, ...] = ()
    tokenizer: str | None = None
    train: tuple[str, ...] = ("kv_only",)
    sequence_length: int = 1024
    batch_size: int = 16
    accumulate: int = 1
    epochs: int = 2
    steps: int | None = None
    template: str = "auto"
    learn: Literal["answers", "all"] = "answers"
    long_rows: Literal["drop", "truncate"] = "drop"
    max_rows: int | None = None
    learning_rate: float = 2e-5
    warmup: float = 0.03
    b1: float = 0.9
    b2: float = 0.999
    weight_decay: float = 0.0
    clip: float = 1.0
    dtype: Literal["bfloat16", "float32"] | None = None
    remat: bool = False
    teacher: str | None = None
    distill: float = 1.0
    mesh: str | None = None
    checkpoint_every: int = 100
    log_every: int = 10
    keep: int = 2
    seed: int = 0
    merge: bool = False
    tensorboard: bool = False

    def __post_init__(self) -> None:
        problems = out_of_range(vars(self), RANGES)
        problems += data_config.out_of_choice(vars(self), CHOICES)
        # YAML may give a text where a list is expected, and a text is a sequence too.
        problems += [
            f"{name} is {getattr(self, name)!r}, expected a list"
            for name in ("data", "train")
            if not isinstance(getattr(self, name), tuple | list)
        ]
        if not problems and self.batch_size % self.accumulate:
            problems.append(
                f"got batch_size {self.batch_size} and accumulate {self.accumulate}, "
                "expected a divisor of the batch"
            )
        try:
            parse_mesh(self.mesh or "data=1")
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def data_config(self) -> DataConfig:
        """The settings of the data, for `train.data`.

        Raises:
            ValueError: no data.
        """
        if not self.data:
            raise ValueError("got no data, expected sources of the form FORMAT:PATH[@WEIGHT]")
        return DataConfig(
            sources=tuple(parse_source(text) for text in self.data),
            sequence_length=self.sequence_length,
            batch_size=self.batch_size,
            template=self.template,
            learn=self.learn,
            epochs=self.epochs,
            seed=self.seed,
            long_rows=self.long_rows,
            max_rows=self.max_rows,
        )


def with_dtype(config: TuneConfig, platform: str | None = None) -> TuneConfig:
    """The settings with a dtype: `kvjax.hf.default_dtype` where none was given.

    Args:
        platform: platform of the devices that train; None for jax's default backend.
    """
    return dataclasses.replace(config, dtype=config.dtype or default_dtype(platform))


def parse_source(text: str) -> SourceConfig:
    """Parses a source of the form FORMAT:PATH or FORMAT:PATH@WEIGHT.

    Raises:
        ValueError: a text of another form.
    """
    # The last "@" separates the weight: paths may contain "@" as well.
    kind, colon, path = text.partition(":")
    path, _, weight = path.rpartition("@") if "@" in path else (path, "", "1")
    try:
        if not (kind and colon and path):
            raise ValueError
        return SourceConfig(path=path, format=kind, weight=float(weight))
    except ValueError:
        raise ValueError(
            f"got source {text!r}, expected FORMAT:PATH or FORMAT:PATH@WEIGHT, "
            "e.g. metamath:meta.jsonl@0.5"
        ) from None


def check_paths(config: TuneConfig) -> None:
    """Raises ValueError where a model, a tokenizer or data is a URL, before anything is read."""
    for name in ("model", "tokenizer", "teacher"):
        local_path(getattr(config, name) or "", name)
    for text in config.data:
        local_path(parse_source(text).path, "data")


def read_config(path: Path, **changes: Any) -> TuneConfig:
    """Reads the settings from a YAML file whose keys are the attributes of `TuneConfig`.

    Args:
        changes: attributes that override the file's.

    Raises:
        ValueError: a URL, no such file, a key without an attribute, or a bad value.
    """
    return read_dataclass(TuneConfig, local_path(path, "config"), **changes)
