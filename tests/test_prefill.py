"""Prompts that are read once for several policies give each what it gets alone."""

import jax
import numpy as np
import pytest
from meshes import GQA, HEAD_LATENTS, LATENTS, MLA, WINDOWED, toy

import kvjax
from kvjax.headkv import HeadScores
from kvjax.policies.named import resolve

SIZE = "kv_size=16,observed=4"
POLICIES = (
    "full",
    f"snapkv:{SIZE}",
    f"adasnapkv:{SIZE}",
    f"headkv:{SIZE},ring=8",
    "headkv_adaptive:ratio=0.4,entries=int8",
    f"h2o:{SIZE}",
    f"expected:{SIZE}",
    "snapkv:kv_size=44,observed=40",  # looks at more queries than the others
)
KINDS = {
    "gqa": ((GQA, GQA), POLICIES),
    "windowed": ((GQA, WINDOWED), POLICIES),
    "mla": ((MLA, MLA), tuple(p for p in POLICIES if "expected" not in p)),
    "equal_cache": ((LATENTS, LATENTS), POLICIES),
    "equal_cache of heads": ((HEAD_LATENTS, GQA), POLICIES),
}
LENGTHS = np.asarray([48, 29, 40, 3], np.int32)


@pytest.mark.parametrize("kind", KINDS)
def test_several_policies_at_once(kind):
    attention, policies = KINDS[kind]
    model, params = toy(*attention)
    scores = HeadScores(np.random.default_rng(0).random((2, 8, 3)) ** 4)
    policies = [resolve(policy, model.config, scores) for policy in policies]
    tokens = np.random.default_rng(1).integers(0, 64, (4, 48)).astype(np.int32)
    settings = {"max_new_tokens": 8}
    logits, caches = kvjax.prefill(model, params, tokens, LENGTHS, policies, **settings)
    assert len(caches) == len(policies)
    for policy, together in zip(policies, caches, strict=True):
        own_logits, alone = kvjax.prefill(model, params, tokens, LENGTHS, policy, **settings)
        np.testing.assert_array_equal(logits, own_logits)
        assert jax.tree.structure(together) == jax.tree.structure(alone)
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_array_equal(a, b)


def test_each_cache_decodes_as_its_own():
    """Caches of one pass share no array: what one writes, or donates, no other sees."""
    model, params = toy(GQA, WINDOWED)
    policies = ["full", f"snapkv:{SIZE}", f"snapkv:{SIZE}"]
    tokens = np.random.default_rng(1).integers(0, 64, (4, 48)).astype(np.int32)
    logits, caches = kvjax.prefill(model, params, tokens, LENGTHS, policies, 8)
    outs = []
    for cache in caches:
        token = logits.argmax(-1)
        for _ in range(3):
            out, cache = kvjax.decode_step(model, params, cache, token)
            token = out.argmax(-1)
        outs.append(np.asarray(out))
    np.testing.assert_array_equal(outs[1], outs[2])
    assert np.abs(outs[0] - outs[1]).max() > 1e-4
