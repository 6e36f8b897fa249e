"""A run that was stopped is the run that was not; loss, counters and optimizer by hand."""

import dataclasses
import json
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.pretrain.curriculum import Curriculum, ModelShape, Stage, read_curriculum
from train.pretrain.episodes import EpisodeConfig
from train.pretrain.run import (
    Progress,
    answer_loss,
    count_answers,
    create_run,
    draw_batch,
    finished_steps,
    learning_rate,
    load_newest,
    make_optimizer,
    pretrain,
    stage_done,
)

RECIPES = Path(__file__).parents[2] / "train" / "pretrain"
EPISODES = EpisodeConfig(40, (2, 2), (1, 1), 1, {"thing": 1})
RECIPE = Curriculum(
    model=ModelShape(16, 1, 2, 1, 8, 16, 64),
    stages=(Stage(EPISODES, 2, 4), Stage(EPISODES, 2, 4)),
    report_every=2,
    warmup_steps=4,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return out, run(out)


def run(out, max_steps=None):
    with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):  # for orbax, optax
        warnings.simplefilter("ignore")
        return pretrain(RECIPE, out, max_steps)


def log(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_killed_and_resumed_run_has_the_same_parameters(finished, tmp_path):
    run(tmp_path, max_steps=5)  # one step after the last checkpoint
    resumed = run(tmp_path)
    for a, b in zip(jax.tree.leaves(finished[1]), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    logs = [[line | {"seconds": 0} for line in log(out)] for out in (finished[0], tmp_path)]
    assert logs[0] == logs[1]


def test_a_finished_run_says_so_and_another_curriculum_is_refused(finished, capsys):
    out, state = finished
    again = run(out)
    assert capsys.readouterr().err == f"{out} is finished: nothing is left to do\n"
    np.testing.assert_array_equal(again.params["embedding"], state.params["embedding"])
    with pytest.raises(ValueError, match=r"holds a run of another curriculum \(seed 0, now 1\)"):
        pretrain(dataclasses.replace(RECIPE, seed=1), out)


def test_log_and_checkpoints(finished):
    lines = log(finished[0])
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    assert [line["stage"] for line in lines] == [0, 0, 1, 1]
    assert [line["tokens"] for line in lines] == [160, 320, 480, 640]
    assert finished_steps(finished[0]) == [6, 8]


def test_norm_weights_stay_at_one_and_the_rest_moves(finished):
    params = finished[1].params
    np.testing.assert_array_equal(params["final_norm"], 1.0)
    np.testing.assert_array_equal(params["layers_0"]["attn_pre_norm"], 1.0)
    assert 0.9 < np.std(params["embedding"]) < 1.1


def test_batches_depend_on_seed_and_step_only():
    run_ = create_run(RECIPE)
    first, again = (draw_batch(run_, Progress(step=7)) for _ in range(2))
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert (first.tokens != draw_batch(run_, Progress(step=8)).tokens).any()
    other = create_run(dataclasses.replace(RECIPE, seed=1))
    assert (first.tokens != draw_batch(other, Progress(step=7)).tokens).any()


def test_rehearsed_questions_are_not_counted():
    run_ = create_run(dataclasses.replace(RECIPE, rehearsal=1.0))
    assert (draw_batch(run_, Progress(stage=0)).kind >= 0).all()
    assert (draw_batch(run_, Progress(stage=1)).kind == -1).all()


def test_learning_rate_warms_up_and_decays():
    stages = (dataclasses.replace(RECIPE.stages[0], decay=True, learning_rate_scale=0.5),)
    recipe = dataclasses.replace(RECIPE, stages=stages)
    assert learning_rate(RECIPE, Progress(step=1)) == RECIPE.learning_rate / 2
    assert learning_rate(RECIPE, Progress(step=100)) == RECIPE.learning_rate
    assert learning_rate(recipe, Progress(step=100, stage_step=3)) == RECIPE.learning_rate / 8


def test_a_stage_ends_at_its_gate_or_its_last_step():
    stage = Stage(dataclasses.replace(EPISODES, kinds={"thing": 1, "age": 1}), 2, 10, gate=0.9)
    assert stage_done(stage, Progress(stage_step=2), {"thing": 0.95, "age": 0.9})
    assert not stage_done(stage, Progress(stage_step=2), {"thing": 0.95, "age": 0.8})
    assert not stage_done(stage, Progress(stage_step=2), {"thing": 0.95})
    assert stage_done(stage, Progress(stage_step=10), {})


def test_loss_weighs_answers_and_text():
    logits = np.random.default_rng(0).standard_normal((1, 3, 4)).astype(np.float32)
    targets, question = jnp.asarray([[1, 2, 3]]), jnp.asarray([[-1, 0, 0]])
    log_probs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    losses = -log_probs[0, np.arange(3), [1, 2, 3]]
    expected = (0.1 * losses[0] + losses[1] + losses[2]) / 2.1
    loss = answer_loss(jnp.asarray(logits), targets, question, 0.1)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_an_answer_counts_when_all_of_its_tokens_are_right():
    targets = jnp.asarray([[1, 2, 3, 1, 2, 0]])
    question = jnp.asarray([[-1, 0, 0, 1, 1, -1]])
    kind = jnp.asarray([[1, 0, -1]])
    predicted = jnp.asarray([[0, 2, 3, 1, 3, 1]])  # question 1 has one wrong token
    logits = jax.nn.one_hot(predicted, 4, dtype=jnp.float32)
    correct, asked = count_answers(logits, targets, question, kind, 2)
    assert correct.tolist() == [0.0, 1.0] and asked.tolist() == [1.0, 1.0]


def test_optimizer_updates_everything_but_norms():
    optimizer = make_optimizer(weight_decay=0.0, b2=0.98, clip=1.0)
    params = {"q": jnp.ones((2, 2)), "attn_pre_norm": jnp.ones((2,))}
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert (updates["q"] != 0).all() and (updates["attn_pre_norm"] == 0).all()


def test_shipped_recipes_are_valid():
    for path in RECIPES.glob("*.yaml"):
        recipe = read_curriculum(path)
        assert recipe.stages[-1].episodes.length < recipe.model.max_position_embeddings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seed: 0", "sed: 0"),
        ("kinds: {thing: 1}", "kinds: {thing: 1, think: 1}"),
        ("hidden_size: 128", "hidden_size: 128\n  depth: 2"),
    ],
)
def test_a_recipe_with_an_unknown_key_is_refused(tmp_path, change, message):
    path = tmp_path / "bad.yaml"
    path.write_text((RECIPES / "needle.yaml").read_text().replace(change, message))
    with pytest.raises(ValueError, match=r"bad\.yaml: .*(sed|think|depth)"):
        read_curriculum(path)


def test_export_needs_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="has no checkpoint"):
        load_newest(tmp_path, create_run(RECIPE))
