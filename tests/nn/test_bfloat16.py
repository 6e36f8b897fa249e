"""A batch in bfloat16 runs through prefill and decode: not every product of XLA:CPU takes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import random_params

from kvjax.config import (
    EqualCacheConfig,
    GQAConfig,
    LayerConfig,
    MLAConfig,
    MLPConfig,
    ModelConfig,
    RopeConfig,
)
from kvjax.nn import Transformer

GQA = GQAConfig(6, 2, 32, 32**-0.5, RopeConfig(32))
ATTENTIONS = {
    "gqa": GQA,
    "after_up": EqualCacheConfig(GQA, 1, 64, 64),
    "before_up": EqualCacheConfig(GQA, 1, 64, 64, "before_up"),
    "mla": MLAConfig(4, 32, 16, 32, 48, None, 48**-0.5, RopeConfig(16, interleaved=True)),
}
B, T = 4, 40


@pytest.mark.parametrize("name", ATTENTIONS)
def test_batch_runs_near_its_float32_self(name):
    layer = LayerConfig(ATTENTIONS[name], MLPConfig(96))
    model = Transformer(ModelConfig("llama", vocab_size=97, hidden_size=64, layers=(layer,)))
    params = random_params(model)
    tokens = jax.random.randint(jax.random.key(0), (B, T + 1), 0, 97)
    want, _ = jax.jit(model.apply)({"params": params}, tokens)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    cache = model.init_cache(B, 64, "bfloat16")
    apply = jax.jit(model.apply)
    first, cache = apply({"params": params}, tokens[:, :T], cache=cache)
    last, _ = apply({"params": params}, tokens[:, T:], cache=cache)
    error = np.abs(np.concatenate([first, last], axis=1) - want).max()
    assert error < 0.05 * np.abs(want).max()
