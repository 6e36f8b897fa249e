"""Settings of a pretraining run: model, optimizer and the stages of the curriculum.

The ranges of all numbers are checked together: one error names everything that is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Len

from kvjax.checks import Range
from kvjax.config import GQAConfig, LayerConfig, MLPConfig, ModelConfig, NormConfig, RopeConfig
from kvjax.fields import (
    Count,
    NotNegative,
    Positive,
    Seed,
    Share,
    Size,
    build,
    check_fields,
    refuse,
)
from kvjax.text_files import read_yaml
from train.pretrain.episodes import KINDS, EpisodeConfig


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model with the architecture of Llama."""

    hidden_size: Count
    num_layers: Count
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    mlp_width: Count
    max_position_embeddings: Count
    rope_theta: Positive = 10_000.0
    norm_eps: Positive = 1e-5


@dataclass(frozen=True)
class Stage:
    """One stage of the curriculum.

    Attributes:
        episodes: settings of the sequences.
        batch_size: B.
        max_steps: largest number of steps.
        gate: the stage ends earlier once this share of the questions of each kind was answered
            right over `report_every` steps.
        rehearses: index of the stage that rehearsal draws from; None: the previous one.
        learning_rate_scale: multiplies the curriculum's learning rate.
        decay: the learning rate falls linearly to zero over `max_steps`.
    """

    episodes: EpisodeConfig
    batch_size: Count
    max_steps: Count
    gate: NotNegative = 0.96
    rehearses: Size | None = None
    learning_rate_scale: Positive = 1.0
    decay: bool = False


@dataclass(frozen=True)
class Curriculum:
    """Settings of a whole run.

    Attributes:
        embedding_scale: standard deviation of the input embeddings at the start.
        text_weight: weight in the loss of tokens outside of answers, whose weight is 1.
        rehearsal: share of the steps that draw from an earlier stage.
        report_every: number of steps between two log lines; then stages end and checkpoints are
            written.

    Raises:
        ValueError: names all numbers of the curriculum, its model and its stages that are out of
            their ranges.
    """

    model: ModelShape
    stages: Annotated[tuple[Stage, ...], Len(1)]
    seed: Seed = 0
    learning_rate: Positive = 2e-3
    warmup_steps: Count = 100
    b2: Annotated[float, Range(least=0, below=1)] = 0.98
    weight_decay: NotNegative = 0.05
    clip: Positive = 1.0
    embedding_scale: Positive = 1.0
    text_weight: NotNegative = 0.02
    rehearsal: Share = 0.25
    report_every: Count = 25

    def __post_init__(self) -> None:
        check_curriculum(self)


def read_curriculum(path: Path) -> Curriculum:
    """Reads a curriculum from a YAML file whose keys are the attributes of the classes above.

    Raises:
        ValueError: an unknown or a missing key, or an unknown kind of question.
    """
    return build(Curriculum, read_yaml(path, "train"), str(path))


def model_config(shape: ModelShape, vocab_size: int, bos_id: int, eos_id: int) -> ModelConfig:
    """The model's configuration, with the config.json of the same model for Hugging Face."""
    attention = GQAConfig(
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        scale=shape.head_dim**-0.5,
        rope=RopeConfig(dim=shape.head_dim, theta=shape.rope_theta),
        norm=NormConfig(eps=shape.norm_eps),
    )
    # Exported checkpoints carry this config.json, which transformers reads.
    hf = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.mlp_width,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_position_embeddings,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "torch_dtype": "bfloat16",
    }
    return ModelConfig(
        model_type="llama",
        vocab_size=vocab_size,
        hidden_size=shape.hidden_size,
        layers=(LayerConfig(attention, MLPConfig(shape.mlp_width)),) * shape.num_layers,
        norm=NormConfig(eps=shape.norm_eps),
        max_position_embeddings=shape.max_position_embeddings,
        bos_id=bos_id,
        eos_ids=(eos_id,),
        hf_json=json.dumps(hf, indent=2),
    )


def check_curriculum(curriculum: Curriculum) -> None:
    """Raises ValueError that names all that is wrong with a `Curriculum`."""
    check_fields(curriculum)
    problems = _model_problems(curriculum.model)
    for index, stage in enumerate(curriculum.stages):
        problems += _stage_problems(f"stages[{index}].", stage, len(curriculum.stages))
        problems += _episode_problems(
            f"stages[{index}].episodes.", stage.episodes, curriculum.model
        )
    refuse(problems)


def _model_problems(model: ModelShape) -> list[str]:
    problems = []
    if model.num_heads % model.num_kv_heads:
        problems.append(
            f"model.num_heads is {model.num_heads}, expected a multiple of num_kv_heads, "
            f"{model.num_kv_heads}"
        )
    if model.head_dim % 2:
        problems.append(f"model.head_dim is {model.head_dim}, expected an even number: RoPE turns")
    return problems


def _stage_problems(prefix: str, stage: Stage, stages: int) -> list[str]:
    if stage.rehearses is None or stage.rehearses < stages:
        return []
    return [f"{prefix}rehearses is {stage.rehearses}, expected 0 to {stages - 1}"]


def _episode_problems(prefix: str, episodes: EpisodeConfig, model: ModelShape) -> list[str]:
    problems, context = [], model.max_position_embeddings
    if episodes.length > context:
        problems.append(
            f"{prefix}length is {episodes.length}, expected at most the model's "
            f"max_position_embeddings, {context}"
        )
    for name in ("people", "answer_length"):
        least, most = getattr(episodes, name)
        if least > most:
            problems.append(f"{prefix}{name} is {[least, most]}, expected [least, most] from 1 up")
    return problems + _kind_problems(f"{prefix}kinds", episodes.kinds)


def _kind_problems(name: str, kinds: Mapping[str, float]) -> list[str]:
    if not kinds:
        return [f"{name} is {kinds!r}, expected the share of each kind"]
    unknown = sorted(map(str, kinds.keys() - set(KINDS)))
    if unknown:
        return [f"{name}: got kinds {unknown}, expected some of {KINDS}"]
    problems = []
    # Sequences of copies have no facts that other kinds could ask about.
    if "copy" in kinds and len(kinds) > 1:
        problems.append(f"{name} has copy beside {sorted(kinds.keys() - {'copy'})}, expected alone")
    if sum(kinds.values()) <= 0:
        problems.append(f"{name}: all shares are 0, expected one above 0")
    return problems
