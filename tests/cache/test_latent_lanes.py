"""Latents in whole lanes, as on TPUs: zeros that change nothing."""

import jax
import pytest
from meshes import MLA, WINDOWED_MLA, ragged_prompts, spread, toy

import kvjax
from kvjax.cache import dense, sharded


def wide(width, platform=None):
    """A stored width that no width here has."""
    return -(-width // 48) * 48


@pytest.mark.parametrize("policy", ["full", "full:entries=int8", "snapkv:kv_size=14,window=4"])
@pytest.mark.parametrize("shape", [None, "data=2,tensor=4"])
def test_the_same_tokens_from_wider_rows(monkeypatch, policy, shape):
    model, params = toy(MLA, WINDOWED_MLA)
    prompts, settings = ragged_prompts()[:2], {"policy": policy, "eos_ids": ()}
    want = kvjax.generate(model, params, prompts, 5, **settings)
    params = params if shape is None else spread(model, params, shape)
    for module in (dense, sharded):
        monkeypatch.setattr(
            module, "stored_width", lambda width, platform=None: -(-width // 48) * 48
        )
    jax.clear_caches()  # programs don't know that the function is another
    got = kvjax.generate(model, params, prompts, 5, **settings)
    jax.clear_caches()
    assert got.tokens == want.tokens
    assert got.cache_bytes > want.cache_bytes


def test_widths_on_platforms():
    assert [dense.stored_width(width, "tpu") for width in (0, 64, 448, 512)] == [0, 128, 512, 512]
    assert dense.stored_width(448, "cpu") == dense.stored_width(448, "gpu") == 448
