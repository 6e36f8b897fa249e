"""The tables of parameters against the Linen modules, and the random values of a key."""

import jax
import numpy as np
import pytest

from kvjax.config import (
    DecoupledConfig,
    EqualCacheConfig,
    GQAConfig,
    LayerConfig,
    MLAConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    RopeConfig,
)
from kvjax.nn import Transformer, param_shapes
from kvjax.nn.params import param_table

ROPE = RopeConfig(8)
PLAIN = GQAConfig(4, 2, 8, 0.3, ROPE)
BIASED = GQAConfig(4, 2, 8, 0.3, ROPE, qkv_bias=True, out_bias=True, qk_norm="head")
ALL = GQAConfig(4, 2, 8, 0.3, ROPE, qk_norm="all")
ATTENTION = {
    "gqa": PLAIN,
    "biased": BIASED,
    "norm over all heads": ALL,
    "equal cache": EqualCacheConfig(BIASED, 2, 8, 8, "after_up"),
    "rotated latents": EqualCacheConfig(ALL, 1, 16, 16, "before_up"),
    "mla": MLAConfig(4, 8, 4, 6, 12, 10, 0.3, RopeConfig(4), query_bias=True, latent_bias=True),
    "mla without rotary key": MLAConfig(4, 8, 0, 6, 12, None, 0.3, None, latent_norm=None),
    "decoupled": DecoupledConfig(BIASED, 12, RopeConfig(4), 6, out_bias=True),
}
MLP = {"mlp": MLPConfig(24, bias=True), "moe": MoEConfig(4, 2, 12)}


def model_of(attention, mlp, **options):
    return Transformer(ModelConfig("llama", 40, 16, (LayerConfig(attention, mlp),), **options))


def initial(model):
    return model.init(jax.random.key(3), np.zeros((1, 5), np.int32))["params"]


@pytest.mark.parametrize("mlp", MLP.values(), ids=MLP)
@pytest.mark.parametrize("attention", ATTENTION.values(), ids=ATTENTION)
def test_shapes_are_those_that_linen_makes(attention, mlp):
    for options in ({}, {"post_norm": True, "pre_norm": False, "tie_embeddings": True}):
        model = model_of(attention, mlp, **options)
        made = jax.eval_shape(lambda model=model: initial(model))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), made) == jax.tree.map(
            lambda x: (x.shape, x.dtype), param_shapes(model.config)
        )


def test_every_axis_has_a_name():
    model = model_of(ATTENTION["decoupled"], MLP["moe"])
    for param in jax.tree.leaves(param_table(model.config)):
        assert len(param.axes) == len(param.shape)


def test_values_of_a_key_do_not_change():
    """Values from before the tables; they follow the order in which parameters are declared."""
    attn = initial(model_of(BIASED, MLP["mlp"], norm=NormConfig(offset=1.0)))["layers_0"]["attn"]
    found = {name: float(np.ravel(attn[name])[0]) for name in ("q", "k", "v", "o")}
    assert found == pytest.approx(
        {"q": 0.327182, "k": 0.1580477, "v": 0.0282196, "o": -0.1512135}, abs=1e-6
    )
