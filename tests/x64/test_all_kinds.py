"""Small runs of what has loop carries, sums and whole numbers; tests/test_x64.py runs them."""

import os

import jax
import numpy as np
import pytest
from meshes import GQA, HEAD_LATENTS, MLA, WINDOWED, spread, toy

import kvjax
from eval import likelihood
from kvjax import transmla
from kvjax.example import Example
from kvjax.headkv import HeadScores
from kvjax.headkv.measure import score_examples
from kvjax.policies.named import parse_policy, resolve

if not os.environ.get("KVJAX_TEST_X64"):
    pytest.skip("tests/test_x64.py runs these, with 64-bit types on", allow_module_level=True)

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8], [2, 7, 1, 8]]
SCORES = HeadScores(np.random.default_rng(0).random((1, 8, 3)))
SIZE = "kv_size=8,observed=4"
CASES = [
    ((GQA,), f"headkv_adaptive:{SIZE},compression_interval=2"),
    ((WINDOWED,), "expected:ratio=0.5,observed=4,entries=int8"),
    ((HEAD_LATENTS,), f"pyramidkv:{SIZE}"),
    ((MLA,), "full"),
]


def test_the_types_are_on():
    assert jax.numpy.arange(3).dtype == "int64"


def generated(model, params, policy):
    policy = resolve(policy, model.config, SCORES)
    return kvjax.generate(model, params, PROMPTS, 5, policy=policy, eos_ids=()).tokens


@pytest.mark.parametrize("attention, policy", CASES)
def test_every_kind_of_cache_and_policy(attention, policy):
    """The tokens are those of 32-bit types."""
    model, params = toy(*attention)
    wide = generated(model, params, policy)
    with jax.enable_x64(False):
        assert generated(model, params, policy) == wide


def test_on_a_mesh():
    model, params = toy(GQA)
    placed, policy = spread(model, params, "data=2,tensor=4"), f"adasnapkv:{SIZE}"
    assert generated(model, placed, policy) == generated(model, params, policy)


def test_contexts_conversions_and_measurements(tmp_path):
    model, params = toy(GQA)
    kvjax.compress(model, params, PROMPTS[0], f"snapkv:{SIZE}").save(tmp_path / "c.kv")
    context = kvjax.load_context(tmp_path / "c.kv", model, params)
    assert len(kvjax.generate(model, params, [[5]], 3, eos_ids=(), context=context).tokens[0]) == 3
    text = np.random.default_rng(0).integers(0, 64, (4, 32))
    stats = transmla.calibrate(model, params, [text])
    sizes = {"stats": stats, "kv_rank": 32, "rope_dim": 16}
    small = transmla.convert(model, params, method="decoupled", **sizes)
    assert all(leaf.dtype == "float32" for leaf in jax.tree.leaves(small[1]))
    rows, policy = np.asarray([PROMPTS[0]] * 2, np.int32), parse_policy(f"snapkv:{SIZE}")
    _, found = next(likelihood.losses_after_prefix(model, params, rows, 10, [policy], 2))
    assert np.isfinite(np.stack(found)).all()
    scored = likelihood.score_compressed(model, params, [PROMPTS[0]], [[5, 6]], policy)
    assert np.isfinite(scored.log_likelihood).all()
    example = Example(tuple(PROMPTS[0]), (7, 8), (2, 4), question_length=2)
    assert score_examples(model, params, [example], "copying").samples.shape == (1, 8, 1)
