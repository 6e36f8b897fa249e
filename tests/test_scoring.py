"""A full cache judges known text as one forward pass does, for every kind of cache."""

import jax
import numpy as np
import pytest
from meshes import (
    GQA,
    HEAD_LATENTS,
    LATENTS,
    MLA,
    WINDOWED,
    WINDOWED_MLA,
    mesh_of_eight,
    spread,
    toy,
)

from kvjax.policies.named import parse_policy
from kvjax.policies.policy import Full
from kvjax.scoring import Text, judge_compressed, judge_dense
from kvjax.sharding import place_params

IDS = np.random.default_rng(0).integers(0, 64, (4, 40)).tolist()
# (first judged token, tokens that are read): the whole context, a part of it, a single token.
PLACES = [(30, 30), (20, 12), (1, 1), (39, 39)]


@pytest.mark.parametrize("attention", [GQA, LATENTS, MLA, WINDOWED, WINDOWED_MLA, HEAD_LATENTS])
@pytest.mark.parametrize("mesh", [None, "data=2,tensor=4"])
def test_a_full_cache_judges_as_one_forward_pass(attention, mesh):
    model, params = toy(attention)
    texts = [Text(ids, *place) for ids, place in zip(IDS, PLACES, strict=True)]
    whole = [text._replace(read=0) for text in texts]
    (dense,) = judge_dense(model, params, whole, 4)
    placed = params if mesh is None else spread(model, params, mesh)
    ((_, cached, _),) = judge_compressed(model, placed, texts, {"full": Full()}, 4)
    for text, one, other in zip(texts, dense, cached, strict=True):
        assert one.wanted.tolist() == other.wanted.tolist() == text.ids[text.first :]
        np.testing.assert_allclose(one.losses, other.losses, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(one.likely, other.likely)


def test_explicit_axes():
    """On a mesh of explicit axes that `jax.set_mesh` has set, as on one device."""
    model, params = toy(GQA)
    mesh_of_eight("data=8")  # skips where there are fewer devices
    made = jax.make_mesh((2, 4), ("data", "tensor"))
    texts = [Text(ids, 30, 30) for ids in IDS]
    policies = {"snapkv": parse_policy("snapkv:kv_size=12,observed=4")}
    ((_, one, _),) = judge_compressed(model, params, texts, policies, 4)
    with jax.set_mesh(made):
        placed = place_params(model, params, made)
        ((_, other, _),) = judge_compressed(model, placed, texts, policies, 4)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a.losses, b.losses, rtol=1e-4, atol=1e-4)
