"""`without_heads` silences the given heads in every form of attention, and no others."""

import jax
import numpy as np
import pytest
from meshes import GQA, HEAD_LATENTS, MLA, toy
from toys import forward

import kvjax
from kvjax.headkv import HeadScores, without_heads

TOKENS = np.arange(1, 13, dtype=np.int32)[None]


@pytest.mark.parametrize("attention", [GQA, HEAD_LATENTS, MLA], ids=["gqa", "latents", "mla"])
def test_all_heads_of_all_layers_leave_the_mlps(attention):
    """Without any head no token sees another: the logits of a token do not depend on its place."""
    model, params = toy(attention, attention)
    layers, heads = model.config.num_layers, model.config.query_heads
    every = [(layer, head) for layer in range(layers) for head in range(heads)]
    silent = forward(model, without_heads(params, every), TOKENS)
    turned = forward(model, without_heads(params, every), TOKENS[:, ::-1].copy())
    np.testing.assert_allclose(silent, turned[:, ::-1], atol=1e-5)
    assert np.abs(silent - forward(model, params, TOKENS)).max() > 0.1


def test_only_the_chosen_rows_change():
    model, params = toy(GQA, GQA)
    fewer = without_heads(params, [(1, 2), (1, 0)])
    changed = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, old), new in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(fewer), strict=True
        )
        if old is not new
    }
    assert changed == {"layers_1/attn/o"}
    old, new = (np.asarray(tree["layers_1"]["attn"]["o"]) for tree in (params, fewer))
    assert not new[[0, 2]].any() and old[[0, 2]].all()
    others = np.setdiff1d(np.arange(len(old)), [0, 2])
    np.testing.assert_array_equal(new[others], old[others])
    assert model.config.num_layers == 2 and without_heads(params, []) == params


def test_a_nan_in_a_silenced_head_is_gone():
    _, params = toy(GQA)
    own = params["layers_0"]["attn"]
    bad = {**params, "layers_0": {**params["layers_0"], "attn": {**own, "o": own["o"] * np.nan}}}
    rows = np.asarray(without_heads(bad, [(0, 1)])["layers_0"]["attn"]["o"])
    assert not rows[1].any() and np.isnan(rows[0]).all()


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ((2, 0), "got head 2-0, expected layers 0 to 1"),
        ((0, -1), "got head 0--1, expected heads 0"),
    ],
)
def test_a_head_that_is_not_there(head, expected):
    _, params = toy(GQA, GQA)
    with pytest.raises(ValueError, match=expected):
        without_heads(params, [head])


def test_ranked_heads():
    samples = np.array([[[1.0, 3.0], [0.0, 0.0]], [[5.0, 5.0], [2.0, 2.0]]])
    assert HeadScores(samples).ranked == [(1, 0), (0, 0), (1, 1), (0, 1)]
    assert kvjax.headkv.default_scores(toy(GQA)[0].config) is None
