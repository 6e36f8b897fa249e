"""A token scorer of your own: keep the tokens whose keys are small (KNorm, arXiv 2406.11430)."""

import jax
import jax.numpy as jnp
import numpy as np

import kvjax
from kvjax.config import GQAConfig, LayerConfig, MLPConfig, ModelConfig, RopeConfig
from kvjax.nn import Transformer
from kvjax.policies.budgets import Uniform
from kvjax.policies.policy import Compress
from kvjax.policies.scorers import LayerView


def small_keys(view: LayerView) -> jax.Array:
    """[B, K, S] scores, higher for tokens to keep; those of padding and window are ignored."""
    return -jnp.linalg.norm(view.keys.astype(jnp.float32), axis=-1)


def main() -> kvjax.Generation:
    """Generates from a random tiny model with 24 tokens per head."""
    attention = GQAConfig(4, 2, 8, scale=8**-0.5, rope=RopeConfig(8))
    config = ModelConfig("llama", 64, 32, (LayerConfig(attention, MLPConfig(64)),) * 2)
    model = Transformer(config)
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    prompts = [np.random.default_rng(0).integers(0, 64, 100).tolist()]
    policy = Compress(Uniform(), small_keys, kv_size=24)
    out = kvjax.generate(model, params, prompts, max_new_tokens=8, policy=policy)
    print(f"{out.tokens[0]}: {out.cache_bytes} bytes, uncompressed {out.full_cache_bytes}")
    return out


if __name__ == "__main__":
    main()
