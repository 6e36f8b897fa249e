"""Which parameters train."""

import numpy as np
import pytest
from tuning_toys import KINDS, toy

from kvjax.nn import param_shapes
from train.finetune.setup import partition, trainable_paths
from train.finetune.step import flatten, unflatten

KV = {
    "gqa": {"k", "v"},
    "equal_cache": {"k_down", "k_up", "v_down", "v_up"},
    "fold": {"kv_a", "k_up", "v_up"},
    "post": {"k", "v", "k_bias", "v_bias", "down", "k_up", "v_up"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_kv_only_is_what_lies_between_the_input_and_keys_and_values(kind):
    model, params = toy(kind)
    paths = trainable_paths(model, params, ["kv_only"])
    assert {path.split("/")[-1] for path in paths} == KV[kind]
    assert len(paths) == model.config.num_layers * len(KV[kind])
    assert all(path.split("/")[1] == "attn" for path in paths)


def test_biases_of_keys_and_values_train_with_them():
    from calibrated_toys import build

    model, params, *_ = build("qwen2")
    names = {path.split("/")[-1] for path in trainable_paths(model, params, ["kv_only"])}
    assert names == {"k", "v", "k_bias", "v_bias"}


def test_groups_and_patterns():
    model, params = toy("gqa")
    everything = set(flatten(params))
    assert trainable_paths(model, params, ["all"]) == everything
    attention = {path for path in everything if "/attn/" in path}
    assert trainable_paths(model, params, ["attention"]) == attention
    both = trainable_paths(model, params, ["layers_1/mlp/*", "final_norm"])
    assert both == {path for path in everything if path.startswith("layers_1/mlp/")} | {
        "final_norm"
    }
    # Shapes are enough.
    assert trainable_paths(model, param_shapes(model.config), ["attention"]) == attention


@pytest.mark.parametrize("which", [["layers_*/attn/key"], ["kv_only", "heads"], ["kv-only"]])
def test_a_pattern_that_matches_nothing_is_an_error(which):
    model, params = toy("gqa")
    with pytest.raises(ValueError, match=r"matches no parameter.*kv_only.*layers_0/attn/k"):
        trainable_paths(model, params, which)
    with pytest.raises(ValueError, match="got nothing to train"):
        trainable_paths(model, params, [])


def test_split_and_back():
    model, params = toy("gqa")
    trainable, frozen = partition(params, trainable_paths(model, params, ["kv_only"]))
    assert not trainable.keys() & frozen.keys()
    whole = unflatten({**trainable, **frozen})
    assert flatten(whole).keys() == flatten(params).keys()
    np.testing.assert_array_equal(whole["layers_1"]["attn"]["k"], params["layers_1"]["attn"]["k"])
