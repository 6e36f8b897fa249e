"""Every family against transformers: logits, greedy tokens, all prefill/decode splits."""

import functools

import jax
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
    """Model, parameters and the jitted step, shared by the tests of a family.

    What is called once runs a program for each kind of layer; the step is one for all layers.
    """
    model, params = kvjax.load(checkpoint(name)[0], dtype="float32")
    return model, params, jax.jit(model.apply)


@functools.cache
def forward(name):
    model, params, _ = loaded(name)
    return np.asarray(model.apply({"params": params}, TOKENS[:1])[0])


def prefill(name, lengths):
    """Logits and caches of a batch whose row b has read the first b + 1 tokens.

    `lengths` are the whole lengths of the sequences, for RoPE rules that depend on them.
    """
    model, params, _ = loaded(name)
    steps = np.arange(T, dtype=np.int32)[None]
    positions = np.where(steps <= np.arange(T)[:, None], steps, -1)
    cache = model.init_cache(T, T, "float32")
    return model.apply({"params": params}, TOKENS, positions, cache, rope_lengths=lengths)


def decode(name, cache, tokens, active, lengths):
    """One token for each row that is active."""
    _, params, step = loaded(name)
    positions = np.where(active, np.asarray(cache[0].lengths), -1).astype(np.int32)[:, None]
    tokens = np.where(active, tokens, 0).astype(np.int32)[:, None]
    variables = {"params": params}
    logits, cache = step(variables, tokens, positions, cache, rope_lengths=lengths)
    return np.asarray(logits[:, 0]), cache


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_torch(name):
    want = torch_logits(checkpoint(name)[1], TOKENS[:1])
    assert np.abs(want).max() > 0.3
    np.testing.assert_allclose(forward(name), want, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_split_equals_the_forward(name):
    full, lengths = forward(name)[0], np.full(T, T, np.int32)
    logits, cache = prefill(name, lengths)
    for b in range(T):
        np.testing.assert_allclose(logits[b, : b + 1], full[: b + 1], atol=1e-4, rtol=0)
    rows = np.arange(T)
    for step in range(1, T):
        new = rows + step
        active = new < T
        out, cache = decode(name, cache, TOKENS[0, np.minimum(new, T - 1)], active, lengths)
        np.testing.assert_allclose(out[active], full[new[active]], atol=1e-4, rtol=0)
    assert cache[0].lengths.tolist() == [T] * T


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_equal_torch(name):
    """Prompts of three lengths in one batch; with longrope only below the original length."""
    count, prompts = 10, (5,) if name == "phi3" else (5, 9, 14)
    rows = np.arange(T, dtype=np.int32)
    lengths = np.minimum(rows + 1 + count, T)
    logits, cache = prefill(name, lengths)
    produced = [np.asarray(logits)[rows, rows].argmax(-1)]
    for _ in range(count - 1):
        out, cache = decode(name, cache, produced[-1], rows < T - count, lengths)
        produced.append(out.argmax(-1))
    tokens = np.stack(produced, axis=1)
    for length in prompts:
        want = torch_greedy(checkpoint(name)[1], TOKENS[0, :length].tolist(), count)
        assert tokens[length - 1].tolist() == want
