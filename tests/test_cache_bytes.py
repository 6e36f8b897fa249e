"""Bytes that a policy really holds, on the embedded model and a 1024-token prompt."""

import jax
import numpy as np
import pytest

import kvjax
from kvjax.cache.pool import bucket_rows
from kvjax.cache.storage import room_bucket
from kvjax.headkv import allocate, load_scores
from kvjax.policies.importance import default_scores
from kvjax.policies.named import resolve
from kvjax.tasks import WordVocabulary, make_examples

LENGTH, NEW = 1024, 8
ITEMSIZE = {"float32": 4, "bfloat16": 2}


@pytest.mark.parametrize("dtype", ITEMSIZE)
@pytest.mark.parametrize("policy", ["headkv", "snapkv", "streaming"])
def test_bytes_are_nominal(policy, dtype):
    model, params = kvjax.load("builtin:needle", dtype=dtype)
    resolved = resolve(f"{policy}:kv_size=64", model.config, default_scores(model.config))
    tokens, lengths = np.zeros((1, LENGTH), np.int32), np.asarray([LENGTH], np.int32)
    # Shapes tell the bytes of the arrays: nothing needs to be compiled for them.
    call = lambda params: kvjax.prefill(model, params, tokens, lengths, resolved, NEW)  # noqa: E731
    _, cache = jax.eval_shape(call, params)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    attention, L = model.config.layers[0].attention, model.config.num_layers
    heads = L * attention.num_kv_heads
    entry = 2 * attention.head_dim * ITEMSIZE[dtype]
    assert resolved.kept(model.config, LENGTH, dtype).sum() == 64 * heads
    tables = 4 * 4 * heads + 3 * 4
    room = room_bucket(NEW) * heads
    assert held == (bucket_rows(64 * heads) + room) * entry + tables
    assert held <= 1.12 * 64 * heads * entry + room * entry + tables
    if (policy, dtype) == ("headkv", "bfloat16"):
        (example,) = make_examples("needle", WordVocabulary(), 1, LENGTH)
        out = kvjax.generate(model, params, [example.prompt], NEW, policy=resolved)
        assert out.cache_bytes == held
        whole = (LENGTH + room_bucket(NEW)) * heads * entry
        assert out.full_cache_bytes == whole + 4 * L + 4


def test_the_shipped_scores_give_budgets_that_differ():
    model, _ = kvjax.load("builtin:needle")
    scores = load_scores(f"{model.config.source}/head_scores.json", model.config)
    caps = allocate(scores, kv_size=64, num_kv_heads=4, prompt_len=1024)
    assert caps.sum() == (64 - 8) * caps.size
    assert caps.max() > 2 * caps.min()
