"""Slots as GPU kernels want them, whatever the number of new tokens is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.oracle import on
from meshes import GQA, HEAD_LATENTS, LATENTS, MLA, ragged_prompts, spread, toy

import kvjax
from kvjax.cache import (
    AttentionSpec,
    DenseCache,
    LatentCache,
    ShardedHeads,
    ShardedSlots,
    sharded,
    storage,
)
from kvjax.cache.pool import bucket_rows, least_steps
from kvjax.cache.room import with_room
from kvjax.cache.storage import room_bucket, whole_slots
from kvjax.capacity.devices import Topology
from kvjax.config import LayerConfig, MLPConfig, ModelConfig
from kvjax.generation import full_cache_bytes
from kvjax.mesh import Placement
from kvjax.policies.compression import Budgets, layer_slots
from kvjax.policies.importance import default_scores
from kvjax.policies.named import resolve
from kvjax.policies.scorers import SinksAndRecent
from kvjax.prefilling import compressions, read_prompts

BUCKET = 48
on_h200 = functools.partial(on, "NVIDIA H200", "gpu")


def prefilled(model, params, new, policy="full"):
    """The caches after prefill: shapes alone."""
    resolved = resolve(policy, model.config, default_scores(model.config))
    tokens, lengths = np.zeros((2, BUCKET), np.int32), np.full(2, BUCKET, np.int32)

    def prefill(params):
        works = compressions(model, params, lengths, [resolved], new)
        return read_prompts(model, params, tokens, works)[1][0]

    return jax.eval_shape(prefill, params)


def slots_of(cache):
    return cache.latent.shape[1] if isinstance(cache, LatentCache) else cache.k.shape[2]


@pytest.mark.parametrize("attention", [GQA, MLA, LATENTS, HEAD_LATENTS])
@pytest.mark.parametrize("new", [1, 8, 50])
def test_full_caches(attention, new):
    model, params = toy(attention)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
    want = BUCKET + room_bucket(new)
    for context in (on_h200, on_tpu):
        with context():
            caches = prefilled(model, params, new)
            (cache,), leaves = caches, jax.tree.leaves(caches)
            held = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
            assert held == full_cache_bytes(model, params, (2, BUCKET), new)
        assert slots_of(cache) == -(-want // 8) * 8 == want
    (cache,) = prefilled(model, params, new)
    assert slots_of(cache) == want


on_tpu = functools.partial(on, "TPU v6 lite", "tpu")


@pytest.mark.parametrize("new", [1, 50])
def test_caches_of_which_all_heads_share_the_tokens(new):
    """snapkv keeps 14 of each prompt."""
    model, params = toy(MLA)
    with on_h200():
        (cache,) = prefilled(model, params, new, "snapkv:kv_size=14,observed=4")
    count = bucket_rows(14) + room_bucket(new)
    assert slots_of(cache) == -(-count // 8) * 8 > count
    (cache,) = prefilled(model, params, new, "snapkv:kv_size=14,observed=4")
    assert slots_of(cache) == count


@pytest.mark.parametrize("lengths", [[1000, 700], [40_000]])
def test_layers_share_few_sizes(lengths):
    """Budgets as uneven as HeadKV's: half of the sizes serve, within the bound of a pool."""
    layers, new = 30, 32
    model = ModelConfig("llama", 53, 32, (LayerConfig(MLA, MLPConfig(32)),) * layers)
    kept = np.random.default_rng(0).integers(40, 200, layers) * max(lengths) // 1000
    shape = len(lengths), layers, 1
    budgets = Budgets(
        caps=np.broadcast_to(kept.astype(np.int32)[None, :, None] - 8, shape),
        recent=np.full(len(lengths), 8, np.int32),
        rooms=np.full(shape, room_bucket(new), np.int32),
        rings=np.zeros(shape, bool),
        scorer=SinksAndRecent(),
    )
    slots = layer_slots(model, budgets, np.asarray(lengths, np.int32), new, range(layers))
    need, held = kept + room_bucket(new), np.asarray([slots[layer] for layer in range(layers)])
    assert (held >= need).all()
    assert held.sum() <= sum(count + count // least_steps(count) for count in need.tolist())
    alone = {bucket_rows(int(count)) + room_bucket(new) for count in kept}
    assert len(set(held)) <= len(alone) // 2


def test_decode_takes_the_kernel():
    """A warning would be an error."""
    positions, spec = jnp.zeros((2, 1), jnp.int32), AttentionSpec(1.0)
    x = {n: jnp.zeros((2, 1, n, 64), jnp.bfloat16) for n in (1, 2, 4)}
    with on_h200():
        S = whole_slots(512 + 50)
        dense = DenseCache.create(2, 2, S, 64, 64, "bfloat16")
        latent = LatentCache.create(2, S, 64, 64, "bfloat16")
        absorbed = (x[4], x[4], x[1][:, :, 0], x[1][:, :, 0], positions, spec)
        for call in (
            lambda: dense.attend(x[4], x[2], x[2], positions, spec)[0],
            lambda: latent.attend_absorbed(*absorbed)[0],
        ):
            assert "wgmma" in str(jax.make_jaxpr(call)())


def test_more_room():
    dense = DenseCache.create(1, 2, 50, 8, 8, "float32")
    latent = LatentCache.create(1, 50, 8, 8, "float32")
    for cache in (dense, latent):
        assert slots_of(with_room(cache, 7, None)) == 57
        with on_h200():
            assert slots_of(with_room(cache, 7, None)) == 64
            assert slots_of(with_room(cache, 6, None)) == 56


def test_slots_on_a_mesh():
    """Whole tiles on every one of four devices."""
    mesh = Topology.parse("h200:4").abstract_mesh({"tensor": 4})
    placement = Placement.create(mesh, 2)
    dense = lambda: ShardedHeads.create(DenseCache.create(2, 4, 50, 8, 8, "int8"), placement)  # noqa: E731
    latent = lambda: ShardedSlots.create(LatentCache.create(2, 50, 8, 8, "int8"), placement, 9)  # noqa: E731
    assert slots_of(jax.eval_shape(dense).inner) == 56
    found = jax.eval_shape(latent).inner
    assert slots_of(found) == found.positions.shape[1] == found.latent.scale.shape[1] == 64


CASES = [("full", None), ("full", "data=2,tensor=4"), ("snapkv:kv_size=14,observed=4", None)]


@pytest.fixture(scope="module")
def answers():
    """By policy with the slots of here, and by policy and shape in larger tiles."""
    models = {policy: toy(*((GQA, MLA) if policy == "full" else (MLA,))) for policy, _ in CASES}

    def generate(policy, shape=None):
        model, params = models[policy]
        placed = params if shape is None else spread(model, params, shape)
        settings = {"policy": policy, "eos_ids": ()}
        return kvjax.generate(model, placed, ragged_prompts()[:2], 5, **settings)

    want = {policy: generate(policy) for policy in models}
    with pytest.MonkeyPatch.context() as patch:
        for module in (storage, sharded):
            patch.setattr(module, "slot_tile", lambda platform=None: 24)
        jax.clear_caches()  # programs don't know that the function is another
        got = {case: generate(*case) for case in CASES}
    jax.clear_caches()
    return want, got


@pytest.mark.parametrize(("policy", "shape"), CASES)
def test_the_same_tokens_from_more_slots(answers, policy, shape):
    want, got = answers[0][policy], answers[1][policy, shape]
    assert got.tokens == want.tokens
    assert got.full_cache_bytes > want.full_cache_bytes
    if policy == "full" and shape is None:
        assert got.cache_bytes == got.full_cache_bytes
