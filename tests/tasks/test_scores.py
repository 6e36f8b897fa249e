"""Scores by hand, and the two that run a model."""

import numpy as np
import pytest
from toys import forward, random_params

from kvjax.config import GQAConfig, LayerConfig, MLPConfig, ModelConfig, RopeConfig
from kvjax.example import Example
from kvjax.nn import Transformer
from kvjax.tasks import accuracy, exact_match, perplexity, predictions, rouge1_recall, token_f1

ATTENTION = GQAConfig(num_heads=2, num_kv_heads=1, head_dim=4, scale=0.5, rope=RopeConfig(4))
MODEL = Transformer(ModelConfig("llama", 11, 8, (LayerConfig(ATTENTION, MLPConfig(8)),)))
EOS = 2


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL)


def test_token_scores():
    assert exact_match([1, 2], (1, 2)) == 1.0
    assert exact_match([1, 2, 3], (1, 2)) == exact_match([2, 1], (1, 2)) == 0.0
    assert token_f1([1, 2, 9], (1, 2)) == pytest.approx(0.8)
    assert token_f1([1, 1], (1,)) == pytest.approx(2 / 3)
    assert rouge1_recall([1, 9, 9], (1, 2)) == 0.5
    assert token_f1([], (1,)) == rouge1_recall([], (1,)) == token_f1([5], (1,)) == 0.0


def test_predictions_are_the_argmax_after_the_right_prefix(params):
    examples = [
        Example(prompt=(1, 4, 5, 6), answer=(7, 8), span=(1, 3)),
        Example(prompt=(1, 9), answer=(3,), span=(1, 2)),
        Example(prompt=(1, 3, 3), answer=(10, 4, 5), span=(1, 2)),
    ]
    found = predictions(MODEL, params, examples, EOS, batch_size=2)
    for ids, example in zip(found, examples, strict=True):
        tokens = np.asarray([[*example.prompt, *example.answer, EOS]], np.int32)
        logits = np.asarray(forward(MODEL, params, tokens))
        expected = np.argmax(logits[0, len(example.prompt) - 1 : -1], axis=-1)
        assert ids == expected.tolist()


def test_accuracy_counts_answers_that_end_where_they_should(params):
    prompt = (1, 4, 5)
    step = predictions(MODEL, params, [Example(prompt, (0,), (1, 2))], EOS)[0][0]
    right = Example(prompt, (step,), (1, 2))
    after = predictions(MODEL, params, [right], EOS)[0][1]
    assert after != EOS  # a random model does not stop
    assert accuracy(MODEL, params, [right, right], EOS) == 0.0
    assert accuracy(MODEL, params, [right, Example(prompt, (), (1, 2))], after) == 0.5 * (
        1.0 + float(step == after)
    )
    assert np.isnan(accuracy(MODEL, params, [], EOS))


def test_perplexity_is_exp_of_the_mean_loss(params):
    tokens = np.random.default_rng(0).integers(0, 11, (3, 6), np.int32)
    logits = np.asarray(forward(MODEL, params, tokens))
    log_probs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    losses = -np.take_along_axis(log_probs[:, :-1], tokens[:, 1:, None], axis=-1)
    expected = np.exp(losses.mean())
    assert perplexity(MODEL, params, [tokens]) == pytest.approx(expected, rel=1e-5)
    assert perplexity(MODEL, params, [tokens[:1], tokens[1:]]) == pytest.approx(expected, rel=1e-5)


def test_perplexity_of_nothing(params):
    with pytest.raises(ValueError, match="no token to predict"):
        perplexity(MODEL, params, [])
