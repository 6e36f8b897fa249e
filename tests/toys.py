"""Small random parameters without compiling an initializer, and one forward for all models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def random_params(model, seed=0, dtype=np.float32):
    """Random parameters for `model`: weights of unit gain, norms and biases away from identity."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        name = path[-1].key
        noise = rng.standard_normal(leaf.shape)
        if "norm" in name:
            noise = 1 + 0.1 * noise
        elif len(leaf.shape) > 1:
            noise = noise / np.sqrt(np.prod(leaf.shape) / max(leaf.shape[-1], leaf.shape[0]))
        return jnp.array(noise.astype(dtype))

    return jax.tree_util.tree_map_with_path(fill, _shapes(model))


@functools.cache
def _shapes(model):
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, tokens, **settings):
    """Logits [B, T, V] without a cache; equal models share the program."""
    return model.apply({"params": params}, tokens, **settings)[0]
