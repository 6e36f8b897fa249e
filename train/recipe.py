"""What a pretraining run is: model, optimizer, curriculum. Plain data; recipes are in recipes/."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from kvjax.config import GQAConfig, LayerConfig, MLPConfig, ModelConfig, NormConfig, RopeConfig
from train.episodes import EpisodeConfig
from train.recipe_check import check_recipe
from train.settings_file import read_settings


@dataclass(frozen=True)
class ModelShape:
    """A llama-shaped model; D, L, N, K, H and F of architecture notation."""

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
        episodes: what its sequences look like.
        batch_size: B.
        max_steps: it ends here at the latest,
        gate: or once each kind of question is answered this often over `report_every` steps.
        rehearses: the stage that a part of its steps draw from, the previous one if None.
        learning_rate_scale: multiplies the recipe's learning rate.
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
class Recipe:
    """A whole run.

    Attributes:
        embedding_scale: standard deviation of the input embeddings at the start.
        text_weight: weight in the loss of tokens that answer nothing.
        rehearsal: share of the steps that draw from an earlier stage.
        report_every: steps between two lines of the log, which is when stages end and
            checkpoints are written.

    Raises:
        ValueError: names every number of the recipe, its model and its stages that is out of its
            range.
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
        check_recipe(self)


def read_recipe(path: Path) -> Recipe:
    """A recipe from a YAML file whose keys are the attributes above.

    Raises:
        ValueError: a key that there is no attribute for, a missing one, or an unknown kind.
    """
    data = read_settings(path)
    try:
        stages = tuple(_stage(stage) for stage in data.pop("stages"))
        recipe = Recipe(model=ModelShape(**data.pop("model")), stages=stages, **data)
    except KeyError as error:
        raise ValueError(f"{path}: {error} is missing") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from None
    return recipe


def _stage(data: dict) -> Stage:
    rest = {name: value for name, value in data.items() if name != "episodes"}
    episodes = dict(data["episodes"])
    for key in ("people", "answer_length"):
        episodes[key] = tuple(episodes[key])
    return Stage(episodes=EpisodeConfig(**episodes), **rest)


def model_config(shape: ModelShape, vocab_size: int, bos_id: int, eos_id: int) -> ModelConfig:
    """The model, with the config.json under which Hugging Face's llama is the same model."""
    attention = GQAConfig(
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        scale=shape.head_dim**-0.5,
        rope=RopeConfig(dim=shape.head_dim, theta=shape.rope_theta),
        norm=NormConfig(eps=shape.norm_eps),
    )
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
