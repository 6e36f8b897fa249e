"""Head importance against a naive oracle that reads the attention of one example at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import random_params

from kvjax.answers import rouge1_recall, token_f1
from kvjax.config import GQAConfig, LayerConfig, MLAConfig, MLPConfig, ModelConfig, RopeConfig
from kvjax.example import Example
from kvjax.headkv.importance import (
    ESTIMATORS,
    attended,
    copied,
    make_batch,
    score_batch,
    score_examples,
)
from kvjax.nn import Transformer
from kvjax.nn.norm import rms_norm
from kvjax.nn.rope import rope

ATTENTION = GQAConfig(4, 2, 8, 8**-0.5, RopeConfig(8))
VOCAB = 7
CONFIG = ModelConfig("llama", VOCAB, 32, (LayerConfig(ATTENTION, MLPConfig(16)),) * 2)


@pytest.fixture(scope="module")
def model():
    return Transformer(CONFIG)


@pytest.fixture(scope="module")
def params(model):
    return random_params(model, seed=3)


@pytest.fixture(scope="module")
def examples(model, params):
    """Prompts whose answers are what the model itself says: all but the last are accepted."""
    forward = jax.jit(model.apply)
    rng = np.random.default_rng(0)
    result = []
    for length, size, span in ((30, 4, (5, 25)), (41, 1, (0, 3)), (20, 6, (2, 20))):
        ids = np.zeros((1, 64), np.int32)
        ids[0, :length] = rng.integers(0, VOCAB, length)
        for at in range(length, length + size):
            logits, _ = forward({"params": params}, ids)
            ids[0, at] = int(jnp.argmax(logits[0, at - 1]))
        answer = tuple(ids[0, length : length + size].tolist())
        prompt = tuple(ids[0, :length].tolist())
        result.append(Example(prompt, answer, span, depth=0.25, name=f"example {len(result)}"))
    wrong = tuple((token + 1) % VOCAB for token in result[1].answer)
    return [*result, Example(result[1].prompt, wrong, (0, 3))]


def rotate(x, positions, lengths):
    return rope(x, positions, lengths, ATTENTION.rope)


def attention_of_steps(params, example):
    """[L, N, m, n'] attention of the tokens that predict the answer, from the parameters alone."""
    ids = np.asarray([*example.prompt, *example.answer[:-1]])
    length, first = len(ids), len(example.prompt) - 1
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    lengths = jnp.asarray([length], jnp.int32)
    x = np.asarray(params["embedding"])[ids]
    rows = []
    for index in range(CONFIG.num_layers):
        layer = params[f"layers_{index}"]
        normed = np.asarray(rms_norm(jnp.asarray(x), layer["attn_pre_norm"], CONFIG.norm))
        q, k, v = (np.einsum("td,dnh->tnh", normed, layer["attn"][name]) for name in "qkv")
        q, k = (
            np.asarray(rope(jnp.asarray(y)[None], positions, lengths, ATTENTION.rope))[0]
            for y in (q, k)
        )
        logits = np.einsum("tnh,snh->nts", q, np.repeat(k, 2, axis=1)) * ATTENTION.scale
        logits[:, ~np.tri(length, dtype=bool)] = -np.inf
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        rows.append(weights[:, first:])
        out = np.einsum("nts,snh->tnh", weights, np.repeat(v, 2, axis=1))
        x = x + np.einsum("tnh,nhd->td", out, layer["attn"]["o"])
        normed = np.asarray(rms_norm(jnp.asarray(x), layer["mlp_pre_norm"], CONFIG.norm))
        gate, up = normed @ layer["mlp"]["gate"], normed @ layer["mlp"]["up"]
        x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["mlp"]["down"]
    return np.stack(rows)


def oracle_copied(attention, example):
    ids = [*example.prompt, *example.answer[:-1]]
    start, end = example.span
    score = np.zeros(attention.shape[:2])
    for step, answer in enumerate(example.answer):
        top = attention[:, :, step].argmax(-1)
        score += (top >= start) & (top < end) & (np.asarray(ids)[top] == answer)
    return score / (end - start)


def oracle_attended(attention, example):
    start, end = example.span
    score = np.zeros(attention.shape[:2])
    for layer, head in np.ndindex(*score.shape):
        for row in attention[layer, head]:
            best = np.argsort(-row, kind="stable")[: end - start]
            score[layer, head] += sum(row[j] for j in best if start <= j < end)
    return score / (end - start)


@pytest.mark.parametrize("reduce, oracle", [(copied, oracle_copied), (attended, oracle_attended)])
def test_scores_equal_the_oracle(model, params, examples, reduce, oracle):
    batch = make_batch(examples, 6, 4)
    scores, predicted = score_batch(model, params, batch, reduce)
    for row, example in enumerate(examples):
        expected = oracle(attention_of_steps(params, example), example)
        np.testing.assert_allclose(scores[row], expected, atol=1e-5)
    for row, example in enumerate(examples[:3]):
        assert tuple(predicted[row, 6 - len(example.answer) :].tolist()) == example.answer
    assert np.asarray(scores).max() > 0


def test_only_answered_examples_count(model, params, examples):
    scores = score_examples(model, params, examples, batch_size=4)
    assert scores.samples.shape == (2, 4, 3)
    assert scores.meta["estimator"] == "retrieval_reasoning"
    assert scores.meta["num_kv_heads"] == 2
    accepted = [sample["accepted"] for sample in scores.meta["samples"]]
    assert accepted == [True, True, True, False]
    first = scores.meta["samples"][0]
    assert first == {
        "name": "example 0",
        "length": 30,
        "depth": 0.25,
        "score": 1.0,
        "accepted": True,
    }


def test_batching_changes_nothing(model, params, examples):
    together = score_examples(model, params, examples[:3], batch_size=4)
    # The same program, an example at a time among copies of itself.
    alone = [score_examples(model, params, [example] * 4, batch_size=4) for example in examples[:1]]
    np.testing.assert_allclose(together.samples[..., 0], alone[0].samples[..., 0], atol=1e-6)


def test_gates():
    assert token_f1([1, 2, 3], [3, 2, 9]) == pytest.approx(2 / 3)
    assert token_f1([1], [2]) == 0
    assert rouge1_recall([1, 1, 2], [1, 1, 3, 2]) == pytest.approx(3 / 4)
    assert ESTIMATORS["retrieval"].gate is rouge1_recall


def test_bad_input(model, params, examples):
    with pytest.raises(ValueError, match="expected one of retrieval"):
        score_examples(model, params, examples, estimator="magic")
    with pytest.raises(ValueError, match="no examples"):
        score_examples(model, params, [])
    with pytest.raises(ValueError, match=r"example 0 has span \(3, 9\)"):
        score_examples(model, params, [Example((1, 2, 3), (4,), (3, 9))])
    with pytest.raises(ValueError, match="answers none of 1 examples"):
        score_examples(model, params, examples[3:], batch_size=4)
    mla = MLAConfig(4, 8, 4, 8, 12, None, 12**-0.5, RopeConfig(4))
    latent = Transformer(CONFIG.with_attention((mla, mla)))
    with pytest.raises(NotImplementedError, match="layer 0 cannot be scored"):
        score_examples(latent, params, examples)
