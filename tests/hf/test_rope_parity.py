"""Every RoPE kind against transformers, below and above the original length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.hf.rope import rope_config
from kvjax.nn.layers import frequencies

pytest.importorskip("torch")
from tiny_checkpoints import LLAMA3, LONGROPE, YARN, build, torch_logits

pytestmark = pytest.mark.parity

T = 24
ORIGINAL = 16
LONG4 = {"short_factor": [1.0, 1.1, 1.3, 1.5], "long_factor": [2.0, 6.0, 7.0, 9.0]}
KINDS = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn_with_factor": {**YARN, "attention_factor": 0.8, "truncate": False, "beta_fast": 8},
    "longrope": {**LONGROPE, **LONG4, "factor": 3.0},
}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_torch(tmp_path, kind):
    case = {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "max_position_embeddings": ORIGINAL if kind == "dynamic" else 64,
        "rope_parameters": dict(KINDS[kind]),
    }
    torch_model = build(case, tmp_path)
    model, params = kvjax.load(tmp_path, dtype="float32")
    apply = jax.jit(model.apply)
    tokens = np.random.default_rng(3).integers(3, 67, (1, T)).astype(np.int32)
    steps = np.arange(T, dtype=np.int32)[None]
    # transformers keeps the frequencies of the longest input so far: the short one goes first.
    for length in (ORIGINAL - 4, T):
        got, _ = apply({"params": params}, tokens, np.where(steps < length, steps, -1))
        want = torch_logits(torch_model, tokens[:, :length])
        np.testing.assert_allclose(got[:, :length], want, atol=2e-4, rtol=0)


def test_kinds_differ():
    """The lengths above are such that the scaling of each kind shows."""

    def numbers(kind, length):
        raw = {"rope_parameters": KINDS[kind], "max_position_embeddings": ORIGINAL}
        inv_freq, factor = frequencies(rope_config(raw, 8, 1e4), jnp.array([length], jnp.int32))
        return np.append(np.asarray(inv_freq), factor)

    plain = numbers("linear", T) * np.array([4.0] * 4 + [1.0])
    for kind in ("linear", "dynamic", "llama3", "yarn", "yarn_with_factor", "longrope"):
        assert not np.allclose(numbers(kind, T), plain)
    for kind in ("dynamic", "longrope"):
        assert not np.allclose(numbers(kind, T), numbers(kind, ORIGINAL))
