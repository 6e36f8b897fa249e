"""Settings of a fine-tuning run, from flags, from a YAML file, or from both."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from kvjax.checks import Range
from kvjax.fields import (
    Count,
    NotNegative,
    Positive,
    Seed,
    Share,
    build,
    field_problems,
    refuse,
)
from kvjax.hf import default_dtype
from kvjax.paths import local_path
from kvjax.sharding import parse_mesh
from kvjax.text_files import read_yaml
from train.data import DataConfig, SourceConfig
from train.data.config import Epochs, Learn, LongRows, RowLength, Template

DecayRate = Annotated[float, Range(least=0, below=1)]


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
    sequence_length: RowLength = 1024
    batch_size: Count = 16
    accumulate: Count = 1
    epochs: Epochs = 2
    steps: Count | None = None
    template: Template = "auto"
    learn: Learn = "answers"
    long_rows: LongRows = "drop"
    max_rows: Count | None = None
    learning_rate: Positive = 2e-5
    warmup: Share = 0.03
    b1: DecayRate = 0.9
    b2: DecayRate = 0.999
    weight_decay: NotNegative = 0.0
    clip: Positive = 1.0
    dtype: Literal["bfloat16", "float32"] | None = None
    remat: bool = False
    teacher: str | None = None
    distill: NotNegative = 1.0
    mesh: str | None = None
    checkpoint_every: Count = 100
    log_every: Count = 10
    keep: Count = 2
    seed: Seed = 0
    merge: bool = False
    tensorboard: bool = False

    def __post_init__(self) -> None:
        problems = list(field_problems(self))
        if not problems and self.batch_size % self.accumulate:
            problems.append(
                f"got batch_size {self.batch_size} and accumulate {self.accumulate}, "
                "expected a divisor of the batch"
            )
        try:
            parse_mesh(self.mesh or "data=1")
        except ValueError as error:
            problems.append(str(error))
        refuse(problems)

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
    path = local_path(path, "config")
    return build(TuneConfig, {**read_yaml(path, "train"), **changes}, str(path))
