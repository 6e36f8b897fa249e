"""Head importance against oracles in plain NumPy that look at one example at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from numpy_model import forward
from toys import random_params

from kvjax import transmla
from kvjax.answers import rouge1_recall, token_f1
from kvjax.config import GQAConfig, LayerConfig, MLAConfig, MLPConfig, ModelConfig, RopeConfig
from kvjax.example import Example
from kvjax.headkv.examples import make_batch
from kvjax.headkv.measure import ESTIMATORS, answer_loss, loss_gradient, score_examples
from kvjax.nn import Transformer
from kvjax.policies.importance import HeadScores, spearman, split_half

ATTENTION = GQAConfig(4, 2, 8, 8**-0.5, RopeConfig(8))
VOCAB = 7
CONFIG = ModelConfig("llama", VOCAB, 32, (LayerConfig(ATTENTION, MLPConfig(16)),) * 2)
STEPS, BATCH = 6, 4


@pytest.fixture(scope="module")
def model():
    return Transformer(CONFIG)


@pytest.fixture(scope="module")
def params(model):
    return random_params(model, seed=3)


@pytest.fixture(scope="module")
def examples(params):
    """Prompts whose answers are what the model itself says: all but the last are answered."""
    rng = np.random.default_rng(0)
    result = []
    for length, size, span in ((30, 4, (5, 25)), (41, 1, (0, 3)), (20, 6, (2, 20))):
        prompt = rng.integers(0, VOCAB, length).tolist()
        ids = list(prompt)
        for _ in range(size):
            ids.append(int(forward(CONFIG, params, ids).logits[-1].argmax()))
        name = f"example {len(result)}"
        result.append(Example(tuple(prompt), tuple(ids[length:]), span, depth=0.25, name=name))
    wrong = tuple((token + 1) % VOCAB for token in result[1].answer)
    return [*result, Example(result[1].prompt, wrong, (0, 3))]


def attention_of_steps(params, example):
    """[L, N, m, n'] attention of the tokens that predict the answer."""
    ids = [*example.prompt, *example.answer[:-1]]
    return forward(CONFIG, params, ids).attention[:, :, len(example.prompt) - 1 :]


def copied(params, example):
    """Steps whose most attended token is in the span and comes next."""
    ids = np.asarray([*example.prompt, *example.answer[:-1]])
    start, end = example.span
    top = attention_of_steps(params, example).argmax(-1)
    hit = (top >= start) & (top < end) & (ids[top] == np.asarray(example.answer))
    return hit.sum(-1) / (end - start)


def attended(params, example):
    """Attention on the span's tokens among the N most attended."""
    start, end = example.span
    attention = attention_of_steps(params, example)
    score = np.zeros(attention.shape[:2])
    for layer, head in np.ndindex(*score.shape):
        for row in attention[layer, head]:
            best = np.argsort(-row, kind="stable")[: end - start]
            score[layer, head] += sum(row[j] for j in best if start <= j < end)
    return score / (end - start)


def induced(params, example):
    """Attention on the tokens of the span that come next."""
    attention = attention_of_steps(params, example)
    score = np.zeros(attention.shape[:2])
    for step, token in enumerate(example.answer):
        for position in range(*example.span):
            if example.prompt[position] == token:
                score += attention[:, :, step, position]
    return score / len(example.answer)


def gradient(params, example):
    """|∂loss/∂gate| by central differences."""
    score = np.zeros((CONFIG.num_layers, ATTENTION.num_heads))
    for head in np.ndindex(*score.shape):
        up, down = np.ones(score.shape), np.ones(score.shape)
        up[head], down[head] = 1 + 1e-4, 1 - 1e-4
        score[head] = abs(loss(params, example, up) - loss(params, example, down)) / 2e-4
    return score


def loss(params, example, gates):
    """Mean cross-entropy of the answer's tokens."""
    ids = [*example.prompt, *example.answer[:-1]]
    logits = forward(CONFIG, params, ids, gates).logits[len(example.prompt) - 1 :]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -log_p[np.arange(len(example.answer)), list(example.answer)].mean()


ORACLES = {
    "retrieval": copied,
    "retrieval_reasoning": attended,
    "enhanced_retrieval": attended,
    "copying": induced,
    "gradient": gradient,
}


def test_every_estimator_has_an_oracle():
    assert set(ORACLES) == set(ESTIMATORS)


@pytest.mark.parametrize("estimator", ["retrieval", "retrieval_reasoning", "copying", "gradient"])
def test_scores_equal_the_oracle(model, params, examples, estimator):
    batch = make_batch(examples, STEPS, BATCH)
    scores, predicted = ESTIMATORS[estimator].measure(model, params, batch)
    for row, example in enumerate(examples):
        np.testing.assert_allclose(scores[row], ORACLES[estimator](params, example), atol=1e-5)
    for row, example in enumerate(examples[:3]):
        assert tuple(predicted[row, STEPS - len(example.answer) :].tolist()) == example.answer
    assert np.asarray(scores).max() > 0.01


def test_enhanced_retrieval_scores_as_retrieval_reasoning_does():
    ours, theirs = (ESTIMATORS[name] for name in ("enhanced_retrieval", "retrieval_reasoning"))
    assert ours.measure.keywords == theirs.measure.keywords
    assert ours[1:] == theirs[1:]


def test_gradient_is_the_same_after_an_exact_conversion(model, params, examples):
    """equal_cache computes the same heads from latents: the loss has the same slopes."""
    batch = make_batch(examples, STEPS, BATCH)
    expected, _ = loss_gradient(model, params, batch)
    converted = transmla.convert(model, params, method="equal_cache", init="svd_per_head")
    scores, _ = loss_gradient(*converted, batch)
    np.testing.assert_allclose(scores, expected, atol=1e-5)


@pytest.mark.parametrize("estimator", ["copying", "gradient"])
def test_bfloat16_scores_are_close(model, params, examples, estimator):
    batch = make_batch(examples, STEPS, BATCH)
    measure = ESTIMATORS[estimator].measure
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    exact, rough = measure(model, params, batch)[0], measure(model, rounded, batch)[0]
    assert rough.dtype == jnp.float32
    np.testing.assert_allclose(rough, exact, atol=0.05 * float(exact.max()))


def test_gradient_of_latent_attention(examples):
    """Heads without keys of their own have outputs all the same."""
    mla = MLAConfig(4, 8, 4, 8, 12, None, 12**-0.5, RopeConfig(4))
    latent = Transformer(CONFIG.with_attention((mla, mla)))
    params = random_params(latent)
    batch = make_batch(examples[:1], STEPS, 1)
    loss = jax.jit(lambda gates: answer_loss(gates, latent, params, batch)[0])
    check_grads(loss, (jnp.ones((2, 4)),), order=1, modes=["rev"], eps=1e-2, rtol=1e-2)
    scores = score_examples(latent, params, examples[:1], "gradient", batch_size=1)
    np.testing.assert_allclose(
        scores.samples[..., 0], np.abs(jax.grad(loss)(jnp.ones((2, 4)))), atol=1e-5
    )


def test_only_answered_examples_count(model, params, examples):
    scores = score_examples(model, params, examples, batch_size=BATCH)
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


@pytest.mark.parametrize("estimator", ["copying", "gradient"])
def test_wrong_answers_count_where_no_answer_is_needed(model, params, examples, estimator):
    scores = score_examples(model, params, examples, estimator, batch_size=BATCH)
    assert scores.samples.shape == (2, 4, 4)
    assert [sample["score"] for sample in scores.meta["samples"]] == [1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("estimator", ["retrieval_reasoning", "gradient"])
def test_companions_in_a_batch_change_nothing(model, params, examples, estimator):
    together = score_examples(model, params, examples[:3], estimator, batch_size=BATCH)
    for index, example in enumerate(examples[:3]):
        # The padding of the answers is the only trace of the others.
        filler = Example(example.prompt, (0,) * STEPS, (0, 1))
        alone = score_examples(model, params, [example, filler], estimator, batch_size=BATCH)
        np.testing.assert_allclose(
            together.samples[..., index], alone.samples[..., 0], atol=1e-6, rtol=1e-5
        )


def test_finished_batches_are_not_measured_again(model, params, examples):
    many = [*examples, *examples[:3]]
    batches = []
    whole = score_examples(model, params, many, batch_size=BATCH, on_batch=batches.append)
    assert [batch.indices for batch in batches] == [(0, 1, 2, 3), (4, 5, 6)]
    rest = []
    again = score_examples(
        model, params, many, batch_size=BATCH, finished=batches[:1], on_batch=rest.append
    )
    assert [batch.indices for batch in rest] == [(4, 5, 6)]
    np.testing.assert_array_equal(again.samples, whole.samples)
    assert again.meta == whole.meta


def test_answer_scores():
    assert token_f1([1, 2, 3], [3, 2, 9]) == pytest.approx(2 / 3)
    assert token_f1([1], [2]) == 0
    assert rouge1_recall([1, 1, 2], [1, 1, 3, 2]) == pytest.approx(3 / 4)
    assert ESTIMATORS["retrieval"].answer_score is rouge1_recall


def test_split_half():
    assert spearman(np.array([1, 5, 2]), np.array([10, 30, 20])) == pytest.approx(1)
    assert spearman(np.array([1, 2, 3]), np.array([3, 2, 1])) == pytest.approx(-1)
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
    assert spearman(np.array([0, 1, 1, 7]), np.arange(4)) == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert np.isnan(spearman(np.ones(3), np.arange(3)))
    rng = np.random.default_rng(0)
    means = rng.random((4, 8, 1))
    same = HeadScores(np.repeat(means, 5, axis=2))
    noise = HeadScores(rng.random((4, 8, 40)))
    assert split_half(same) == pytest.approx(1)
    assert abs(split_half(noise)) < 0.3
    assert np.isnan(split_half(HeadScores(means)))


def test_bad_input(model, params, examples):
    with pytest.raises(ValueError, match="expected one of retrieval"):
        score_examples(model, params, examples, estimator="magic")
    with pytest.raises(ValueError, match="no examples"):
        score_examples(model, params, [])
    with pytest.raises(ValueError, match="batch_size is 0"):
        score_examples(model, params, examples, batch_size=0)
    with pytest.raises(ValueError, match=r"example 0 has span \(3, 9\)"):
        score_examples(model, params, [Example((1, 2, 3), (4,), (3, 9))])
    context = model.config.context_length
    with pytest.raises(
        ValueError, match=rf"{context + 1} prompt tokens, expected at most {context}"
    ):
        score_examples(model, params, [Example((1,) * (context + 1), (4,), (3, 9))])
    with pytest.raises(ValueError, match="3 prompt and 0 answer tokens"):
        score_examples(model, params, [Example((1, 2, 3), ())], estimator="gradient")
    with pytest.raises(ValueError, match=r"answers none of 1 examples.*copying and gradient"):
        score_examples(model, params, examples[3:], batch_size=BATCH)


@pytest.mark.parametrize("rope_site, init", [("after_up", "svd_global"), ("before_up", "identity")])
def test_heads_keep_their_scores_when_the_model_is_converted(
    model, params, examples, rope_site, init
):
    converted = transmla.convert(model, params, init=init, rope_site=rope_site)
    before, after = (
        score_examples(*pair, examples, batch_size=BATCH).samples
        for pair in ((model, params), converted)
    )
    np.testing.assert_allclose(after, before, atol=1e-5)


def test_heads_of_latent_attention_have_scores(examples):
    mla = MLAConfig(4, 8, 4, 8, 12, None, 12**-0.5, RopeConfig(4))
    latent = Transformer(CONFIG.with_attention((mla, mla)))
    everyone = ESTIMATORS["retrieval_reasoning"]._replace(accept_above=-1.0)
    scores = score_examples(latent, random_params(latent), examples, everyone, batch_size=BATCH)
    assert scores.samples.shape == (2, 4, 4) and scores.meta["num_kv_heads"] == 1
    assert (scores.samples > 0).any()
