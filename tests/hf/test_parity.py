"""Every family against transformers: logits, greedy tokens, all prefill/decode splits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax

pytest.importorskip("torch")
from tiny_checkpoints import CASES, checkpoint, torch_greedy, torch_logits

pytestmark = pytest.mark.parity

T = 24
TOKENS = np.random.default_rng(5).integers(3, 67, (T, T)).astype(np.int32)
TOKENS[:] = TOKENS[:1]  # one sequence; row b of a batch is where it is split
FAMILIES = [name for name in CASES if name not in ("llama_biases", "deepseek_v3_full_q")]


@functools.cache
def loaded(name):
    """Model, parameters and the jitted calls on them, shared by the tests of a family."""
    model, params = kvjax.load(checkpoint(name)[0], dtype="float32")
    return model, params, jax.jit(model.apply)


@functools.cache
def forward(name):
    _, params, apply = loaded(name)
    return np.asarray(apply({"params": params}, TOKENS[:1])[0])


@functools.cache
def prefilled(name):
    """Logits and caches of a batch whose row b has read the first b + 1 tokens."""
    model, params, apply = loaded(name)
    steps = np.arange(T, dtype=np.int32)[None]
    positions = jnp.asarray(np.where(steps <= np.arange(T)[:, None], steps, -1))
    cache = model.init_cache(T, T, "float32")
    return apply({"params": params}, TOKENS, positions, cache)


def decode(name, cache, tokens, active):
    """One token for each row that is active."""
    _, params, apply = loaded(name)
    positions = np.where(active, np.asarray(cache[0].lengths), -1).astype(np.int32)
    tokens = np.where(active, tokens, 0).astype(np.int32)
    logits, cache = apply({"params": params}, tokens[:, None], positions[:, None], cache)
    return np.asarray(logits[:, 0]), cache


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_torch(name):
    want = torch_logits(checkpoint(name)[1], TOKENS[:1])
    assert np.abs(want).max() > 0.3
    np.testing.assert_allclose(forward(name), want, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_split_equals_the_forward(name):
    full = forward(name)[0]
    logits, cache = prefilled(name)
    for b in range(T):
        np.testing.assert_allclose(logits[b, : b + 1], full[: b + 1], atol=1e-4, rtol=0)
    rows = np.arange(T)
    for step in range(1, T):
        new = rows + step
        active = new < T
        out, cache = decode(name, cache, TOKENS[0, np.minimum(new, T - 1)], active)
        np.testing.assert_allclose(out[active], full[new[active]], atol=1e-4, rtol=0)
    assert cache[0].lengths.tolist() == [T] * T


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_equal_torch(name):
    """Prompts of three lengths, one batch."""
    prompts, count = {5, 9, 14}, 10
    if name == "phi3":
        # Above the original length longrope fixes its frequencies for the whole generation.
        model, params, _ = loaded(name)
        out = kvjax.generate(model, params, [TOKENS[0, :5].tolist()], 10, eos_ids=())
        assert out.tokens[0] == torch_greedy(checkpoint(name)[1], TOKENS[0, :5].tolist(), count)
        return
    logits, cache = prefilled(name)
    newest = np.take_along_axis(np.asarray(logits), np.arange(T)[:, None, None], 1)[:, 0]
    produced = [newest.argmax(-1)]
    active = np.arange(T) < T - count
    for _ in range(count - 1):
        out, cache = decode(name, cache, produced[-1], active)
        produced.append(out.argmax(-1))
    tokens = np.stack(produced, axis=1)
    for length in prompts:
        want = torch_greedy(checkpoint(name)[1], TOKENS[0, :length].tolist(), count)
        assert tokens[length - 1].tolist() == want
