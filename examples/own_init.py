"""A new way to factor K and V for TransMLA's equal_cache: an orthonormal latent.

    python examples/own_init.py

An init is a function from the weight [inputs, KV heads, head dim], the number of query heads that
share a KV head, and the layer's RoPE (None for values) to the two factors. kvjax checks that their
product is the weight and, with rope_site="before_up", that they commute with RoPE.
"""

import jax
import jax.numpy as jnp
import numpy as np

import kvjax
from kvjax.config import GQAConfig, LayerConfig, MLPConfig, ModelConfig, RopeConfig


def orthonormal(weight, repeats, rope):
    """QR: the columns of `down` are orthonormal, so latents of white inputs are white."""
    rows, K, H = weight.shape
    q, r = np.linalg.qr(weight.reshape(rows, K * H))
    up = np.repeat(r.reshape(K * H, K, H), repeats, axis=1)
    return kvjax.transmla.Factors(down=q[:, None], up=up[None])


def main():
    attention = GQAConfig(
        num_heads=4, num_kv_heads=2, head_dim=16, scale=16**-0.5, rope=RopeConfig(16)
    )
    layer = LayerConfig(attention, MLPConfig(128))
    model = kvjax.Transformer(ModelConfig("llama", 100, 64, (layer, layer)))
    tokens = jnp.arange(20, dtype=jnp.int32)[None]
    params = model.init(jax.random.key(0), tokens)["params"]

    init: kvjax.transmla.Init = orthonormal
    mla_model, mla_params = kvjax.transmla.to_equal_cache(model, params, init=init)
    before, _ = model.apply({"params": params}, tokens)
    after, _ = mla_model.apply({"params": mla_params}, tokens)
    difference = float(jnp.abs(after - before).max())
    print(f"largest logit {jnp.abs(before).max():.2f}, largest difference {difference:.1e}")

    try:
        kvjax.transmla.to_equal_cache(model, params, init=orthonormal, rope_site="before_up")
    except ValueError as error:
        print(f"before_up: {error}")
    return difference


if __name__ == "__main__":
    main()
