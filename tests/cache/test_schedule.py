"""The kernels' work lists of a step, made once for all layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.oracle import interpreted_tpu, on
from meshes import mesh_of_eight, ragged_prompts, toy

import kvjax
import pallas_kernels
from kvjax.cache.layers import scheduled
from kvjax.config import GQAConfig, RopeConfig
from kvjax.prefilling import pad
from kvjax.sharding import place_params
from pallas_kernels import api

WIDE = GQAConfig(8, 4, 128, 0.1, RopeConfig(128))
NARROW = GQAConfig(2, 2, 128, 0.1, RopeConfig(128))
on_tpu = functools.partial(on, "TPU v6 lite", "tpu")


@pytest.fixture(autouse=True)
def aligned(monkeypatch):
    """Pools as TPUs want them."""
    monkeypatch.setattr("kvjax.policies.compression.alignment", lambda dtype, layout: 16)


def prefilled(layers, mesh=None, attention=WIDE, batch=8):
    model, params = toy(*[attention] * layers)
    params = place_params(model, params, mesh)
    tokens, lengths = pad(ragged_prompts()[:batch], 48)
    policy = "snapkv:kv_size=12"
    _, cache = kvjax.prefill(model, params, tokens, lengths, policy=policy, max_new_tokens=8)
    return model, params, cache


def test_lists_change_nothing(monkeypatch):
    """A step with the lists of all layers, and one in which each layer makes its own."""
    model, params, cache = prefilled(2, None, NARROW, 2)
    token, live = jnp.arange(2), jnp.arange(2) != 0

    def step(cache):
        return kvjax.decode_step(model, params, cache, token, live)

    with interpreted_tpu():
        got, after = jax.jit(step)(cache)
        monkeypatch.setattr("kvjax.decoding.scheduled", lambda caches, *_: caches)
        want, _ = jax.jit(lambda cache: step(cache))(cache)
    np.testing.assert_array_equal(got, want)
    assert jax.tree.structure(after) == jax.tree.structure(cache)


def test_a_step_makes_its_lists_once():
    """However many layers there are."""
    counts = []
    for layers in (1, 3):
        model, params, cache = prefilled(layers)
        with on_tpu():
            step = functools.partial(kvjax.decode_step, model, params)
            text = str(jax.make_jaxpr(step)(cache, jnp.arange(8)))
        assert "decode_attention" in text
        counts.append(text.count("searchsorted"))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("shape", ["data=8", "data=2,tensor=4", "tensor=8"])
def test_each_device_lists_its_own_heads(shape, monkeypatch):
    mesh = mesh_of_eight(shape)
    cache = prefilled(2, mesh)[-1]
    (pool,) = cache.pools
    positions = jnp.where(jnp.arange(8) == 3, -1, 50)[:, None]
    monkeypatch.setattr(api, "target", lambda: TPU)
    (got,) = (found.schedule for found in scheduled(cache, positions, [8, 8]).pools)
    parts = {name: of_devices(getattr(pool, name)) for name in ("starts", "capacities", "kept")}
    stored, entries = of_devices(spread(pool, positions >= 0)), of_devices(pool.k)
    for device, lists in zip(mesh.devices.flat, map_devices(got, mesh), strict=True):
        starts, capacities, kept = (np.swapaxes(part[device], 0, 1) for part in parts.values())
        live = np.minimum(kept + stored[device][None], capacities)
        live = np.where(stored[device][None] > 0, live, 0)  # a sequence that has ended is not read
        shapes = dict.fromkeys(("k_pool", "v_pool"), entries[device])
        group = 8 // pool.starts.shape[2]
        settings = {"queries_per_head": group, "align": pool.align, "span": pool.span}
        want = pallas_kernels.schedule(jnp.asarray(starts), jnp.asarray(live), **shapes, **settings)
        jax.tree.map(np.testing.assert_array_equal, lists, want)


TPU = api.Target("tpu", "TPU v6 lite", 1, None)


def of_devices(x):
    """What each device holds of an array."""
    return {shard.device: np.asarray(shard.data) for shard in x.addressable_shards}


def map_devices(tree, mesh):
    """What each device holds of a pytree."""
    leaves, kind = jax.tree.flatten(tree)
    held = [of_devices(leaf) for leaf in leaves]
    return [kind.unflatten([part[device] for part in held]) for device in mesh.devices.flat]


def spread(pool, stored):
    """Where sequences lie."""
    return jax.device_put(stored.astype(jnp.int32), pool.lengths.sharding)
