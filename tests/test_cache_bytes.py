"""Bytes that a policy really holds, on the embedded model and a 1024-token prompt."""

import functools

import jax
import numpy as np
import pytest

import kvjax
from kvjax.decoding import prefill
from kvjax.headkv import allocate, load_scores
from kvjax.headkv.policy import resolve
from kvjax.headkv.scores import default_scores
from kvjax.tasks import WordVocabulary, make_examples

LENGTH, NEW = 1024, 8
ITEMSIZE = {"float32": 4, "bfloat16": 2}


@pytest.mark.parametrize("dtype", ITEMSIZE)
@pytest.mark.parametrize("policy", ["headkv", "snapkv", "streaming"])
def test_bytes_are_nominal(policy, dtype):
    model, params = kvjax.load("builtin:needle", dtype=dtype)
    resolved = resolve(f"{policy}:kv_size=64", model.config, default_scores(model.config))
    plan = resolved.plan(model.config, LENGTH, dtype)
    tokens, lengths = np.zeros((1, LENGTH), np.int32), np.asarray([LENGTH], np.int32)
    # Shapes tell the bytes of the arrays: nothing needs to be compiled for them.
    call = functools.partial(prefill, model, plan=plan, max_new_tokens=NEW)
    _, cache = jax.eval_shape(call, params, tokens=tokens, lengths=lengths)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    attention, L = model.config.layers[0].attention, model.config.num_layers
    entry = L * attention.num_kv_heads * 2 * attention.head_dim * ITEMSIZE[dtype]
    assert (64 + NEW) * entry <= held <= 1.1 * 64 * entry + NEW * entry
    if (policy, dtype) == ("headkv", "bfloat16"):
        (example,) = make_examples("needle", WordVocabulary(), 1, LENGTH)
        out = kvjax.generate(model, params, [example.prompt], NEW, policy=resolved)
        assert out.cache_bytes == held
        assert out.full_cache_bytes == (LENGTH + NEW) * entry + 4 * L


def test_the_shipped_scores_give_budgets_that_differ():
    model, _ = kvjax.load("builtin:needle")
    scores = load_scores(f"{model.config.source}/head_scores.json", model.config)
    caps = allocate(scores, kv_size=64, num_kv_heads=4, prompt_len=1024)
    assert caps.sum() == (64 - 8) * caps.size
    assert caps.max() > 2 * caps.min()
