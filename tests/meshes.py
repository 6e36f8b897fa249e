"""Eight fake devices in four shapes, and toys that are run on them."""

import jax
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
from kvjax.sharding import make_mesh, parse_mesh, place_params

# The last one has more devices along its tensor axis than the toys have KV heads.
SHAPES = ("data=8", "data=2,tensor=4", "data=2,fsdp=2,tensor=2", "tensor=8")
ROPE = RopeConfig(16)
GQA = GQAConfig(8, 4, 16, 0.25, ROPE)
WINDOWED = GQAConfig(8, 4, 16, 0.25, ROPE, window=12, softcap=20.0)
MLA = MLAConfig(8, 16, 8, 16, 32, None, 0.2, RopeConfig(8))
WINDOWED_MLA = MLAConfig(8, 16, 8, 16, 32, None, 0.2, RopeConfig(8), window=12)
LATENTS = EqualCacheConfig(GQA, 1, 64, 64, "after_up")
HEAD_LATENTS = EqualCacheConfig(GQA, 4, 16, 16, "before_up")


def mesh_of_eight(shape):
    if len(jax.devices()) < 8:
        pytest.skip(f"needs 8 devices, there are {len(jax.devices())}")
    return make_mesh(parse_mesh(shape), jax.devices()[:8])


def toy(*attention):
    """A model with these attention layers, vocabulary 64, and its parameters."""
    layers = tuple(LayerConfig(each, MLPConfig(48)) for each in attention)
    model = Transformer(ModelConfig("llama", 64, 32, layers))
    return model, random_params(model)


def spread(model, params, shape):
    """The parameters on eight devices; from the host, where no shape needs a program to cut it."""
    return place_params(model, jax.tree.map(np.asarray, params), mesh_of_eight(shape))


def ragged_prompts(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 64, n).tolist() for n in (40, 33, 47, 21, 48, 40, 9, 30)]
