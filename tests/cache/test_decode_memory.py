"""A decode step needs little memory beside the caches that it updates in place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import random_params

from kvjax.cache import cache_bytes
from kvjax.config import GQAConfig, LayerConfig, MLPConfig, ModelConfig, RopeConfig
from kvjax.nn import Transformer
from kvjax.policies.compression import Budgets, compression
from kvjax.policies.scorers import SinksAndRecent

LAYERS, K, H, B = 4, 2, 32, 2
CAPS = ((40, 980), (300, 700), (10, 1060), (500, 500))


@pytest.fixture(scope="module")
def model():
    attention = GQAConfig(4, K, H, H**-0.5, RopeConfig(H))
    layer = LayerConfig(attention, MLPConfig(64))
    return Transformer(ModelConfig("llama", 64, 64, (layer,) * LAYERS))


def dense(model, dtype):
    return model.init_cache(B, 1024, dtype)


def head_budget(model, dtype):
    caps = np.broadcast_to(np.asarray(CAPS, np.int32), (B, LAYERS, K))
    recent, rooms = np.zeros(B, np.int32), np.zeros_like(caps)
    budgets = Budgets(caps, recent, rooms, rooms < 0, SinksAndRecent())
    lengths = np.full(B, 2048, np.int32)
    return compression(model.config, budgets, lengths, 0, dtype, None, range(LAYERS)).start()


CASES = [(create, dtype) for create in (dense, head_budget) for dtype in ("float32", "bfloat16")]


@pytest.mark.parametrize(("create", "dtype"), CASES)
def test_temporaries_are_below_a_quarter_of_the_cache(model, create, dtype):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), random_params(model))
    cache = create(model, dtype)

    def step(params, tokens, cache):
        return model.apply({"params": params}, tokens, cache=cache)

    tokens = jnp.zeros((B, 1), jnp.int32)
    compiled = jax.jit(step, donate_argnames="cache").lower(params, tokens, cache).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= 0.99 * cache_bytes(cache)  # updated in place
    assert memory.temp_size_in_bytes < 0.25 * cache_bytes(cache)
