"""A budget allocator of your own: the first and the last layer get twice as much as the others."""

import jax
import jax.numpy as jnp
import numpy as np

import kvjax
from kvjax.config import GQAConfig, LayerConfig, MLPConfig, ModelConfig, RopeConfig
from kvjax.nn import Transformer
from kvjax.policies.budgets import Request, largest_remainder
from kvjax.policies.policy import Compress
from kvjax.policies.scorers import ObservationWindow


def ends_first(request: Request) -> np.ndarray:
    """[L, K] whole budgets, none above request.limit, the window not included."""
    weights = np.ones((request.num_layers, request.num_kv_heads))
    weights[[0, -1]] = 2
    caps = np.minimum(request.budget * weights / weights.mean(), request.limit)
    return largest_remainder(caps, int(caps.sum()))


def main() -> kvjax.Generation:
    """Generates from a random tiny model with 24 tokens per head."""
    attention = GQAConfig(4, 2, 8, scale=8**-0.5, rope=RopeConfig(8))
    config = ModelConfig("llama", 64, 32, (LayerConfig(attention, MLPConfig(64)),) * 3)
    model = Transformer(config)
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    prompts = [np.random.default_rng(0).integers(0, 64, 100).tolist()]
    policy = Compress(ends_first, ObservationWindow(), kv_size=24)
    out = kvjax.generate(model, params, prompts, max_new_tokens=8, policy=policy)
    print(f"{out.tokens[0]}: {out.cache_bytes} bytes, uncompressed {out.full_cache_bytes}")
    return out


if __name__ == "__main__":
    main()
