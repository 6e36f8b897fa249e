"""Small random parameters without compiling an initializer, and one forward for all models."""

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.nn import param_shapes


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
        return jax.device_put(noise.astype(dtype))  # jnp.array would compile for every shape

    return jax.tree_util.tree_map_with_path(fill, param_shapes(model.config))


def cast(params, dtype):
    """The parameters in another dtype, which the host converts: jax compiles nothing for it."""
    return jax.tree.map(lambda x: jax.device_put(np.asarray(x).astype(jnp.dtype(dtype))), params)


def forward(model, params, tokens, **settings):
    """Logits [B, T, V] without a cache; models share the programs of equal blocks."""
    arrays = {name: jax.device_put(np.asarray(value)) for name, value in settings.items()}
    return model.apply({"params": params}, jax.device_put(np.asarray(tokens)), **arrays)[0]
