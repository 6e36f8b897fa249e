"""The ranges of a pretraining recipe's numbers; all that is wrong with a recipe in one error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvjax.checks import COUNT, NOT_NEGATIVE, POSITIVE, SEED, SHARE, Range, optional, out_of_range
from train.episodes import KINDS, EpisodeConfig

RECIPE = {
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


def check_recipe(recipe: Any) -> None:
    """Raises ValueError that names all that is wrong with a `train.recipe.Recipe`."""
    problems = out_of_range(vars(recipe), RECIPE) + _model_problems(recipe.model)
    if not recipe.stages:
        problems.append("stages is empty, expected at least one")
    for index, stage in enumerate(recipe.stages):
        problems += _stage_problems(f"stages[{index}].", stage, len(recipe.stages))
        problems += _episode_problems(f"stages[{index}].episodes.", stage.episodes, recipe.model)
    if problems:
        raise ValueError("; ".join(problems))


def _model_problems(model: Any) -> list[str]:
    problems = out_of_range(vars(model), MODEL, "model.")
    if problems:
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
    if "copy" in kinds and len(kinds) > 1:
        problems.append(f"{name} has copy beside {sorted(kinds.keys() - {'copy'})}, expected alone")
    if not problems and sum(kinds.values()) <= 0:
        problems.append(f"{name}: all shares are 0, expected one above 0")
    return problems
