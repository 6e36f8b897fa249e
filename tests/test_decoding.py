"""A step of decoding: the same from blocks and as one program, whatever cache it is given."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import GQA, LATENTS, MLA, WINDOWED, toy
from toys import cast, forward

import kvjax
from kvjax.config import GQAConfig, LongRopeScaling, RopeConfig
from kvjax.headkv import HeadScores
from kvjax.policies.named import resolve

LENGTHS = np.asarray([31, 24, 9], np.int32)  # of one bucket, so that they are one batch
TOKENS = np.random.default_rng(0).integers(0, 64, (3, 48)).astype(np.int32)
PROMPTS = TOKENS[:, :32]
POLICIES = [
    "full",
    "adasnapkv:kv_size=16",
    "headkv:kv_size=16,compression_interval=5",
    "h2o:kv_size=16",
]
fused = jax.jit(kvjax.decode_step, static_argnums=0, donate_argnums=2)


def policy_of(model, text):
    scores = HeadScores(np.random.default_rng(0).random((model.config.num_layers, 8, 3)) ** 4)
    return resolve(text, model.config, scores)


def copied(cache):
    """The same arrays once more, through the host: jax compiles nothing for their shapes."""
    return jax.tree.map(lambda x: jax.device_put(np.array(x), x.sharding), cache)


@pytest.mark.parametrize("policy", POLICIES)
def test_blocks_and_whole_steps_give_the_same_tokens(policy):
    model, params = toy(GQA, WINDOWED)
    prompts = [TOKENS[row, :n].tolist() for row, n in enumerate(LENGTHS)]
    settings = {"policy": policy_of(model, policy), "eos_ids": (7,)}
    found = {}
    for how in ("block", "step"):
        seen = [[] for _ in prompts]
        stream = lambda index, ids, seen=seen: seen[index].append(ids)  # noqa: E731
        out = kvjax.generate(model, params, prompts, 24, on_tokens=stream, compile=how, **settings)
        assert seen == [[[token] for token in row] for row in out.tokens]  # one by one
        found[how] = out.tokens
    assert found["block"] == found["step"]
    assert kvjax.generate(model, params, prompts, 24, **settings).tokens == found["block"]


def test_what_is_compiled_has_a_name():
    model, params = toy(GQA)
    with pytest.raises(ValueError, match="compile is 'layer', expected None, 'block' or 'step'"):
        kvjax.generate(model, params, [[1]], 2, compile="layer")


@pytest.mark.parametrize("attention", [(GQA, WINDOWED), (MLA,), (LATENTS,)])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_blocks_and_whole_steps_give_near_logits(attention, dtype, tolerance):
    model, params = toy(*attention)
    params = cast(params, dtype)
    logits, caches = kvjax.prefill(
        model, params, PROMPTS, LENGTHS, ["full", "snapkv:kv_size=16"], 8
    )
    for cache in caches:
        blocks, whole = cache, copied(cache)
        token = np.argmax(logits, -1)
        for _ in range(4):
            got, blocks = kvjax.decode_step(model, params, blocks, token)
            want, whole = fused(model, params, whole, token)
            np.testing.assert_allclose(got, want, atol=tolerance)
            token = np.argmax(want, -1)
        np.testing.assert_array_equal(blocks.lengths, LENGTHS + 4)


@pytest.mark.parametrize("attention", [GQA, MLA, LATENTS])
def test_a_list_of_caches_from_init_cache(attention):
    model, params = toy(attention, attention)
    want = forward(model, params, TOKENS)
    cache, start = model.init_cache(3, 48, "float32"), jnp.asarray(TOKENS[:, :40])
    logits, cache = model.apply({"params": params}, start, cache=cache, logits_at="last")
    np.testing.assert_allclose(logits[:, 0], want[:, 39], atol=1e-4)
    for step in range(40, 44):
        logits, cache = kvjax.decode_step(model, params, cache, TOKENS[:, step])
        np.testing.assert_allclose(logits, want[:, step], atol=1e-4)


@pytest.mark.parametrize("policy", ["full", "snapkv:kv_size=16", "full:entries=int8"])
def test_sequences_that_have_ended_store_nothing(policy):
    model, params = toy(GQA, WINDOWED)
    settings = (model, params, PROMPTS, LENGTHS, policy, 8)
    (_, cache), (_, other) = kvjax.prefill(*settings), kvjax.prefill(*settings)
    before = jax.tree.map(np.array, cache)
    live = np.asarray([True, False, True])
    for step in range(3):
        token = TOKENS[:, step]
        got, cache = kvjax.decode_step(model, params, cache, token, live)
        want, other = kvjax.decode_step(model, params, other, token)
        np.testing.assert_allclose(got[live], want[live], atol=1e-5)
    np.testing.assert_array_equal(cache.lengths, LENGTHS + 3 * live)
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(np.asarray(a)[1], b[1])


@pytest.mark.parametrize("policy", ["full", "snapkv:kv_size=16", "full:entries=int8"])
@pytest.mark.parametrize("layers", [(GQA, GQA), (MLA, MLA)], ids=["GQA", "MLA"])
def test_sequences_that_have_ended_are_not_read(layers, policy):
    model, params = toy(*layers)
    (_, cache), (_, other) = (
        kvjax.prefill(model, params, PROMPTS, LENGTHS, policy, 8) for _ in range(2)
    )
    damaged = lambda x: x.at[1].set(jnp.nan) if jnp.issubdtype(x.dtype, jnp.floating) else x  # noqa: E731
    cache = jax.tree.map(damaged, cache)
    live = np.asarray([True, False, True])
    for step in range(2):
        got, cache = kvjax.decode_step(model, params, cache, TOKENS[:, step], live)
        want, other = kvjax.decode_step(model, params, other, TOKENS[:, step], live)
        assert np.isfinite(got).all()
        np.testing.assert_array_equal(got, want)
    # A sequence that is live reads its damaged entries.
    got, _ = kvjax.decode_step(model, params, cache, TOKENS[:, 2])
    assert np.isnan(got[1]).any()


ORIGINAL = 113  # tokens up to which LongRoPE divides by the short factors


@pytest.mark.parametrize("policy", ["full", "snapkv:kv_size=48"])
def test_the_room_of_a_cache_is_no_part_of_its_text(policy):
    """LongRoPE goes by the whole length, prompt and tokens to come, and never by the capacity."""
    scaling = LongRopeScaling((1.0,) * 8, tuple(np.linspace(1.5, 4, 8)), ORIGINAL, 1.2)
    model, params = toy(*[GQAConfig(8, 4, 16, 0.25, RopeConfig(16, scaling=scaling))] * 2)
    one, length = TOKENS[:1, :40], np.asarray([40], np.int32)

    @functools.cache
    def steps(new):
        logits, cache = kvjax.prefill(model, params, one, length, policy, new)
        outs = [logits]
        for step in range(4):
            logits, cache = kvjax.decode_step(model, params, cache, TOKENS[:1, 40 + step])
            outs.append(logits)
        return np.concatenate(outs), int(np.min(cache.capacity))

    (short, little), (same, more), (long, most) = steps(8), steps(66), steps(74)
    assert little < ORIGINAL < more == most
    np.testing.assert_allclose(short, same, atol=1e-5)  # 48 and 106 tokens in all
    assert np.abs(short - long).max() > 1e-3  # 114 tokens
    for new, outs in ((66, same), (74, long)):
        whole = jnp.asarray([40 + new], jnp.int32)
        want = forward(model, params, TOKENS[:1, :44], rope_lengths=whole)[0, 39:]
        np.testing.assert_allclose(outs, want, atol=1e-4)
