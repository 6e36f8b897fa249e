"""Prefill, compression and decode on eight devices are what they are on one."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from meshes import (
    GQA,
    HEAD_LATENTS,
    LATENTS,
    MLA,
    SHAPES,
    WINDOWED,
    WINDOWED_MLA,
    spread,
    toy,
)

import kvjax
from kvjax.config import RopeConfig
from kvjax.headkv import HeadScores, balance
from kvjax.policies.budgets import HeadImportance
from kvjax.policies.named import parse_policy, snapkv
from kvjax.prefilling import pad
from kvjax.sharding import make_mesh, place_params

NEW = 6
LENGTHS = 29, 21, 32, 17, 30, 25, 9, 31
"""Of prompts that share a bucket, so that all eight are one batch; one is shorter than a budget."""
PROMPTS = [np.random.default_rng(n).integers(0, 64, n).tolist() for n in LENGTHS]
COMPRESSED = "kv_size=14,observed=4"
KINDS = {
    "gqa": (GQA,) * 3,
    "windowed": (WINDOWED, GQA, WINDOWED),
    "mla": (MLA,) * 2,
    "windowed_mla": (WINDOWED_MLA, MLA),
    "latents": (LATENTS,) * 2,
    "head_latents": (HEAD_LATENTS,) * 2,
}


@functools.cache
def model_of(kind):
    return toy(*KINDS[kind])


def uneven(num_layers=3, **settings):
    """HeadKV with budgets that differ from head to head; the first heads get most in all layers."""
    own = np.random.default_rng(3).random((num_layers, 8, 1))
    scores = own + np.repeat([3.0, 1.0, 0.3, 0.1], 2)[None, :, None]
    allocator = HeadImportance(1.2, HeadScores(scores))
    return dataclasses.replace(
        snapkv(kernel_size=3), allocator=allocator, kv_size=14, observed=4, **settings
    )


def policy_of(name):
    return uneven() if name == "headkv" else name


@functools.cache
def on_one_device(kind, policy):
    model, params = model_of(kind)
    return kvjax.generate(model, params, PROMPTS, NEW, policy_of(policy), eos_ids=())


def read(model, params, policy, new=NEW):
    """Logits after the prompts, and the cache that decode begins with."""
    tokens, lengths = pad(PROMPTS, 32)
    return kvjax.prefill(model, params, tokens, lengths, policy, max_new_tokens=new)


def rows_of_heads(cache, order):
    """Live keys of each head [layer][sequence][head], heads in the model's order."""
    found = []
    for layer, heads in zip(cache, order, strict=True):
        inner = getattr(layer, "inner", layer)
        pool, starts = np.asarray(inner.pool.k), np.array(inner.table("starts"))
        live = np.asarray(inner.live(inner.given()))
        devices = 1 if cache.placement is None else cache.placement.ways
        own = np.repeat(np.arange(devices), starts.shape[1] // devices)
        starts = starts + own * (pool.shape[1] // devices)
        copies = starts.shape[1] // len(heads)
        back = np.argsort(heads) * copies
        found.append(
            [
                [rows[begin[k] :][: count[k]] for k in back]
                for rows, begin, count in zip(pool, starts, live, strict=True)
            ]
        )
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "kind, policy",
    [("gqa", "full"), ("gqa", "headkv"), ("mla", "full"), ("mla", f"snapkv:{COMPRESSED}")],
)
def test_the_same_tokens(kind, policy, shape):
    model, params = model_of(kind)
    many = spread(model, params, shape)
    got = kvjax.generate(model, many, PROMPTS, NEW, policy_of(policy), eos_ids=())
    assert got.tokens == on_one_device(kind, policy).tokens


@pytest.mark.parametrize(
    "kind, policy",
    [
        ("gqa", "full:entries=int8"),
        ("gqa", f"headkv_adaptive:{COMPRESSED}"),
        ("gqa", f"tova:{COMPRESSED}"),
        ("gqa", f"h2o:{COMPRESSED}"),
        ("gqa", f"snapkv:{COMPRESSED},compression_interval=3"),
        ("gqa", f"snapkv:{COMPRESSED},compression_interval=3,entries=int4"),
        ("windowed", "full:entries=int4"),
        ("gqa", f"pyramidkv:{COMPRESSED},ring=2,entries=int8"),
        ("windowed", "full"),
        ("windowed", f"snapkv:{COMPRESSED}"),
        ("windowed_mla", "full"),
        ("latents", "full"),
        ("latents", f"snapkv:{COMPRESSED}"),
        ("head_latents", f"snapkv:{COMPRESSED}"),
    ],
)
def test_every_cache_over_heads_and_sequences(kind, policy):
    model, params = model_of(kind)
    if policy.startswith("headkv_adaptive"):
        policy = dataclasses.replace(
            parse_policy(policy), allocator=HeadImportance(1.2, HeadScores(np.ones((3, 8, 1))))
        )
    want = kvjax.generate(model, params, PROMPTS, NEW, policy, eos_ids=())
    many = spread(model, params, "data=2,tensor=4")
    got = kvjax.generate(model, many, PROMPTS, NEW, policy, eos_ids=())
    assert got.tokens == want.tokens


@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_entries_stay(shape):
    """With heads as they are, and with heads assigned to devices by their bytes."""
    model, params = model_of("gqa")
    order = [range(4)] * 3
    logits, one = read(model, params, uneven())
    want = rows_of_heads(one, order)
    assert len({len(head) for layer in want for head in layer[0]}) > 3
    many = spread(model, params, shape)
    moved, policy = balance(model, many, uneven(), 32)
    orders = getattr(policy.allocator, "orders", order)
    for params_there, policy_there, heads in ((many, uneven(), order), (moved, policy, orders)):
        got_logits, cache = read(model, params_there, policy_there)
        np.testing.assert_allclose(got_logits, logits, atol=1e-4)
        got = rows_of_heads(cache, heads)
        for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("shape", [None, "data=2,tensor=4"])
def test_layers_of_two_shapes_have_a_pool_each(shape):
    small = dataclasses.replace(GQA, head_dim=8, rope=RopeConfig(8))
    model, params = toy(GQA, small, GQA)
    want = kvjax.generate(model, params, PROMPTS, NEW, eos_ids=()).tokens
    many = params if shape is None else spread(model, params, shape)
    assert len(read(model, many, "snapkv:kv_size=200")[1].pools) == 2
    for policy in ("snapkv:kv_size=200", "snapkv:kv_size=200,compression_interval=3"):
        got = kvjax.generate(model, many, PROMPTS, NEW, policy, eos_ids=())
        assert got.tokens == want


def test_balanced_heads_take_less():
    """One head a device and layer: a pool a layer would be as large as its largest head."""
    model, params = model_of("gqa")
    many = spread(model, params, "data=2,tensor=4")
    _, plain = read(model, many, uneven(), new=0)
    _, balanced = read(model, *balance(model, many, uneven(), 32), new=0)
    (before,), (after,) = plain.pools, balanced.pools
    rows = [pool.k.shape[1] for pool in (before, after)]
    largest = np.asarray(after.capacities).max(axis=(0, 2)).sum() * 4
    assert rows[1] < rows[0] and rows[1] < 0.85 * largest
    assert {shard.data.shape[:2] for shard in after.k.addressable_shards} == {(4, rows[1] // 4)}


def test_a_mesh_of_one_device():
    model, params = model_of("gqa")
    alone = place_params(model, params, make_mesh({}, jax.devices()[:1]))
    policy, prompts = f"snapkv:{COMPRESSED}", PROMPTS[:3]
    for context in (None, kvjax.compress(model, alone, prompts[0], policy)):
        asked = {"eos_ids": (), "context": context} | ({} if context else {"policy": policy})
        want = kvjax.generate(model, params, prompts, 3, **asked).tokens
        assert kvjax.generate(model, alone, prompts, 3, **asked).tokens == want


def test_sampling_on_a_mesh():
    model, params = model_of("gqa")
    settings = {"temperature": 1.0, "top_p": 0.9, "seed": 5, "eos_ids": ()}
    want = kvjax.generate(model, params, PROMPTS, NEW, **settings)
    many = spread(model, params, "data=2,tensor=4")
    assert kvjax.generate(model, many, PROMPTS, NEW, **settings).tokens == want.tokens


def test_sequences_that_devices_do_not_divide():
    model, params = model_of("gqa")
    many = spread(model, params, "data=2,tensor=4")
    for policy in ("full", f"snapkv:{COMPRESSED}"):
        want = kvjax.generate(model, params, PROMPTS[:3], NEW, policy, eos_ids=())
        got = kvjax.generate(model, many, PROMPTS[:3], NEW, policy, eos_ids=())
        assert got.tokens == want.tokens


def test_what_a_mesh_cannot_serve():
    model, params = model_of("gqa")
    many = spread(model, params, "tensor=8")
    with pytest.raises(NotImplementedError, match="8 devices along the tensor axis share"):
        kvjax.generate(model, many, PROMPTS, NEW, f"h2o:{COMPRESSED}")
    odd, odd_params = toy(dataclasses.replace(GQA, num_heads=6, num_kv_heads=3))
    many = spread(odd, odd_params, "data=4,tensor=2")
    with pytest.raises(ValueError, match=r"3 KV heads over 2 devices .* one divides the other"):
        kvjax.generate(odd, many, PROMPTS, NEW)
