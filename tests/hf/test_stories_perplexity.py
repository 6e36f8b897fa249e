"""A real pretrained checkpoint: its perplexity is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax

pytestmark = pytest.mark.data


def test_perplexity(data_dir):
    directory = data_dir / "checkpoints" / "stories260k"
    model, params = kvjax.load(directory, dtype="float32")

    @jax.jit
    def loss(tokens):
        logits, _ = model.apply({"params": params}, tokens)
        log_probs = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.mean(jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1))

    tokens = np.load(directory / "heldout.npy")
    assert tokens.shape == (128, 256)
    losses = [loss(tokens[i : i + 32]) for i in range(0, 128, 32)]
    assert np.exp(np.mean(losses)) == pytest.approx(6.488, abs=0.005)


def test_tokenizer(data_dir):
    tokenizer = kvjax.load_tokenizer(data_dir / "checkpoints" / "stories260k")
    ids = tokenizer.encode("Once upon a time")
    assert ids == [1, 403, 407, 261, 378]
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "Once upon a time"
