"""equal_cache on a real checkpoint."""

import jax
import numpy as np
import pytest

import kvjax
import kvjax.transmla

pytestmark = pytest.mark.data
PAIRS = [
    ("svd_global", "after_up"),
    ("svd_per_head", "after_up"),
    ("identity", "before_up"),
    ("svd_complex", "before_up"),
]


@pytest.fixture(scope="module")
def stories(data_dir):
    directory = data_dir / "checkpoints" / "stories260k"
    model, params = kvjax.load(directory, dtype="float32")
    tokens = np.load(directory / "heldout.npy")[:2].astype(np.int32)
    return model, params, tokens, logits_of(model, params, tokens)


def logits_of(model, params, tokens):
    return np.asarray(model.apply({"params": params}, tokens)[0])


@pytest.mark.parametrize(("init", "site"), PAIRS)
def test_no_logit_changes(stories, init, site):
    model, params, tokens, want = stories
    converted = kvjax.transmla.convert(model, params, init=init, rope_site=site)
    assert np.abs(logits_of(*converted, tokens) - want).max() < 1e-4


def test_native_layout_keeps_a_converted_model(stories, tmp_path):
    model, params, _, _ = stories
    converted, new = kvjax.transmla.convert(model, params, init="identity", rope_site="before_up")
    kvjax.save(converted, new, tmp_path / "converted")
    loaded, params = kvjax.load(tmp_path / "converted", dtype="float32")
    assert loaded.config == converted.config
    jax.tree.map(np.testing.assert_array_equal, params, new)
