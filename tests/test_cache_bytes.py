"""Bytes that a policy really holds, on the embedded model and a 1024-token prompt."""

import pytest

import kvjax
from kvjax.headkv import allocate, load_scores
from kvjax.tasks import WordVocabulary, make_examples

NEW = 8
ITEMSIZE = {"float32": 4, "bfloat16": 2}


@pytest.mark.parametrize("dtype", ITEMSIZE)
@pytest.mark.parametrize("policy", ["headkv", "snapkv", "streaming"])
def test_bytes_are_nominal(policy, dtype):
    model, params = kvjax.load("builtin:needle", dtype=dtype)
    (example,) = make_examples("needle", WordVocabulary(), 1, 1024)
    out = kvjax.generate(
        model, params, [example.prompt], max_new_tokens=NEW, policy=f"{policy}:kv_size=64"
    )
    attention, L = model.config.layers[0].attention, model.config.num_layers
    entry = L * attention.num_kv_heads * 2 * attention.head_dim * ITEMSIZE[dtype]
    assert (64 + NEW) * entry <= out.cache_bytes <= 1.1 * 64 * entry + NEW * entry
    assert out.full_cache_bytes == (1024 + NEW) * entry + 4 * L


def test_the_shipped_scores_give_budgets_that_differ():
    model, _ = kvjax.load("builtin:needle")
    scores = load_scores(f"{model.config.source}/head_scores.json", model.config)
    caps = allocate(scores, kv_size=64, num_kv_heads=4, prompt_len=1024)
    assert caps.sum() == (64 - 8) * caps.size
    assert caps.max() > 2 * caps.min()
