"""Latents in whole lanes, as on TPUs: zeros that change nothing."""

import jax
import pytest
from meshes import MLA, WINDOWED_MLA, ragged_prompts, spread, toy

import kvjax
from kvjax.cache import dense, sharded

SHAPES = (None, "data=2,tensor=4")
POLICIES = ("full", "full:entries=int8", "snapkv:kv_size=14,observed=4")


def wide(width, platform=None):
    """A stored width that no width here has."""
    return -(-width // 48) * 48


@pytest.fixture(scope="module")
def answers():
    """By policy: one device, and both shapes with wider rows; all with the same programs."""
    model, params = toy(MLA, WINDOWED_MLA)
    places = {shape: params if shape is None else spread(model, params, shape) for shape in SHAPES}

    def generate(params, policy):
        settings = {"policy": policy, "eos_ids": ()}
        return kvjax.generate(model, params, ragged_prompts()[:2], 5, **settings)

    want = {policy: generate(params, policy) for policy in POLICIES}
    with pytest.MonkeyPatch.context() as patch:
        for module in (dense, sharded):
            patch.setattr(module, "stored_width", wide)
        jax.clear_caches()  # programs don't know that the function is another
        got = {
            (policy, shape): generate(places[shape], policy)
            for policy in POLICIES
            for shape in SHAPES
        }
    jax.clear_caches()
    return want, got


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_tokens_from_wider_rows(answers, policy, shape):
    want, got = answers[0][policy], answers[1][policy, shape]
    assert got.tokens == want.tokens
    assert got.cache_bytes > want.cache_bytes


def test_widths_on_platforms():
    assert [dense.stored_width(width, "tpu") for width in (0, 64, 448, 512)] == [0, 128, 512, 512]
    assert dense.stored_width(448, "cpu") == dense.stored_width(448, "gpu") == 448
