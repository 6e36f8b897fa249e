"""Settings of a pretraining run: model, optimizer and the stages of the curriculum.

The ranges of all numbers are checked together: one error names everything that is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvjax.checks import COUNT, NOT_NEGATIVE, POSITIVE, SEED, SHARE, Range, optional, out_of_range
from kvjax.config import GQAConfig, LayerConfig, MLPConfig, ModelConfig, NormConfig, RopeConfig
from train.pretrain.episodes import KINDS, EpisodeConfig
from train.settings import read_settings


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model with the architecture of Llama."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    max_position_embeddings: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5


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
    batch_size: int
    max_steps: int
    gate: float = 0.96
    rehearses: int | None = None
    learning_rate_scale: float = 1.0
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
    stages: tuple[Stage, ...]
    seed: int = 0
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    b2: float = 0.98
    weight_decay: float = 0.05
    clip: float = 1.0
    embedding_scale: float = 1.0
    text_weight: float = 0.02
    rehearsal: float = 0.25
    report_every: int = 25

    def __post_init__(self) -> None:
        check_curriculum(self)


def read_curriculum(path: Path) -> Curriculum:
    """Reads a curriculum from a YAML file whose keys are the attributes of the classes above.

    Raises:
        ValueError: an unknown or a missing key, or an unknown kind of question.
    """
    data = read_settings(path)
    # Missing keys are KeyError, unknown keys TypeError, wrong types AttributeError or TypeError.
    try:
        stages = tuple(_stage(stage) for stage in data.pop("stages"))
        curriculum = Curriculum(model=ModelShape(**data.pop("model")), stages=stages, **data)
    except KeyError as error:
        raise ValueError(f"{path}: {error} is missing") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from None
    return curriculum


def _stage(data: dict) -> Stage:
    rest = {name: value for name, value in data.items() if name != "episodes"}
    episodes = dict(data["episodes"])
    # YAML has lists, the dataclass has tuples.
    for key in ("people", "answer_length"):
        episodes[key] = tuple(episodes[key])
    return Stage(episodes=EpisodeConfig(**episodes), **rest)


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


CURRICULUM = {
    "seed": SEED,
    "learning_rate": POSITIVE,
    "warmup_steps": COUNT,
    "b2": Range(least=0, below=1),
    "weight_decay": NOT_NEGATIVE,
    "clip": POSITIVE,
    "embedding_scale": POSITIVE,
    "text_weight": NOT_NEGATIVE,
    "rehearsal": SHARE,
    "report_every": COUNT,
}


MODEL = {
    **dict.fromkeys(("hidden_size", "num_layers", "num_heads", "num_kv_heads"), COUNT),
    **dict.fromkeys(("head_dim", "mlp_width", "max_position_embeddings"), COUNT),
    "rope_theta": POSITIVE,
    "norm_eps": POSITIVE,
}


STAGE = {
    "batch_size": COUNT,
    "max_steps": COUNT,
    "gate": NOT_NEGATIVE,
    "rehearses": optional(Range(least=0, whole=True)),
    "learning_rate_scale": POSITIVE,
}


EPISODES = {"length": Range(least=2, whole=True), "questions": COUNT, "wording": SHARE}


def check_curriculum(curriculum: Any) -> None:
    """Raises ValueError that names all that is wrong with a `Curriculum`."""
    problems = out_of_range(vars(curriculum), CURRICULUM) + _model_problems(curriculum.model)
    if not curriculum.stages:
        problems.append("stages is empty, expected at least one")
    for index, stage in enumerate(curriculum.stages):
        problems += _stage_problems(f"stages[{index}].", stage, len(curriculum.stages))
        problems += _episode_problems(
            f"stages[{index}].episodes.", stage.episodes, curriculum.model
        )
    if problems:
        raise ValueError("; ".join(problems))


def _model_problems(model: Any) -> list[str]:
    problems = out_of_range(vars(model), MODEL, "model.")
    if problems:  # the checks below need numbers
        return problems
    if model.num_heads % model.num_kv_heads:
        problems.append(
            f"model.num_heads is {model.num_heads}, expected a multiple of num_kv_heads, "
            f"{model.num_kv_heads}"
        )
    if model.head_dim % 2:
        problems.append(f"model.head_dim is {model.head_dim}, expected an even number: RoPE turns")
    return problems


def _stage_problems(prefix: str, stage: Any, stages: int) -> list[str]:
    problems = out_of_range(vars(stage), STAGE, prefix)
    if not problems and stage.rehearses is not None and stage.rehearses >= stages:
        problems.append(f"{prefix}rehearses is {stage.rehearses}, expected 0 to {stages - 1}")
    if stage.decay not in (False, True):
        problems.append(f"{prefix}decay is {stage.decay!r}, expected true or false")
    return problems


def _episode_problems(prefix: str, episodes: EpisodeConfig, model: Any) -> list[str]:
    problems = out_of_range(vars(episodes), EPISODES, prefix)
    context = model.max_position_embeddings
    if not problems and COUNT.holds(context) and episodes.length > context:
        problems.append(
            f"{prefix}length is {episodes.length}, expected at most the model's "
            f"max_position_embeddings, {context}"
        )
    for name in ("people", "answer_length"):
        pair = getattr(episodes, name)
        if len(pair) != 2 or not all(map(COUNT.holds, pair)) or pair[0] > pair[1]:
            problems.append(f"{prefix}{name} is {list(pair)}, expected [least, most] from 1 up")
    return problems + _kind_problems(f"{prefix}kinds", episodes.kinds)


def _kind_problems(name: str, kinds: Mapping[str, Any]) -> list[str]:
    if not isinstance(kinds, Mapping) or not kinds:
        return [f"{name} is {kinds!r}, expected the share of each kind"]
    unknown = sorted(map(str, kinds.keys() - set(KINDS)))
    if unknown:
        return [f"{name}: got kinds {unknown}, expected some of {KINDS}"]
    problems = out_of_range(kinds, dict.fromkeys(kinds, NOT_NEGATIVE), f"{name}.")
    # Sequences of copies have no facts that other kinds could ask about.
    if "copy" in kinds and len(kinds) > 1:
        problems.append(f"{name} has copy beside {sorted(kinds.keys() - {'copy'})}, expected alone")
    if not problems and sum(kinds.values()) <= 0:
        problems.append(f"{name}: all shares are 0, expected one above 0")
    return problems
