"""Models that give NaN, and tokens that a model does not have: no score and no accuracy of them."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from toys import random_params

import kvjax
from kvjax.capacity.plan import Request
from kvjax.config import GQAConfig, LayerConfig, MLPConfig, ModelConfig, RopeConfig
from kvjax.example import Example
from kvjax.headkv.examples import Grid, make_examples
from kvjax.headkv.measure import ESTIMATORS, score_examples
from kvjax.nn import Transformer
from kvjax.policies.named import parse_policy
from kvjax.scoring import compare

VOCAB = 16
EXAMPLES = [Example(tuple(range(2, 14)), (5, 6), (3, 5), question_length=2)] * 3


@pytest.fixture(scope="module")
def loaded():
    layer = LayerConfig(GQAConfig(4, 2, 8, 8**-0.5, RopeConfig(8)), MLPConfig(32))
    config = ModelConfig("llama", VOCAB, 32, (layer, layer), eos_ids=(1,))
    model = Transformer(config)
    return model, random_params(model)


def broken(params):
    """One number of one weight is NaN."""
    new = jax.tree.map(lambda leaf: leaf, params)
    new["layers_1"]["attn"]["k"] = new["layers_1"]["attn"]["k"].at[0, 0, 0].set(jnp.nan)
    return new


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_importance_of_nan_attention_is_refused(loaded, estimator):
    model, params = loaded
    message = "the measurements of example 0 are not finite: layers_1/attn/k has NaN"
    with pytest.raises(ValueError, match=message):
        score_examples(model, broken(params), EXAMPLES, estimator)


@pytest.mark.parametrize("token", [-1, VOCAB, 10**6])
@pytest.mark.parametrize("part", ["prompt", "answer"])
def test_examples_with_tokens_that_the_model_does_not_have(loaded, token, part):
    model, params = loaded
    ids = (*getattr(EXAMPLES[0], part)[:-1], token)
    examples = [EXAMPLES[0], dataclasses.replace(EXAMPLES[0], **{part: ids})]
    policies = {"snapkv": parse_policy("snapkv:kv_size=10")}
    with pytest.raises(ValueError, match=f"example 1 has token .*expected ids of 0 to {VOCAB - 1}"):
        score_examples(model, params, examples, "copying")
    with pytest.raises(ValueError, match=f"example 1 has token .*expected ids of 0 to {VOCAB - 1}"):
        compare(model, params, examples, policies)


def test_policies_are_not_compared_on_nan(loaded):
    model, params = loaded
    policies = {"snapkv": parse_policy("snapkv:kv_size=10")}
    found = compare(model, params, EXAMPLES, policies, batch_size=2)
    assert all(len(right) == 3 for right in found.right.values())
    message = "example 0 under policy 'full' are not finite: layers_1/attn/k has NaN"
    with pytest.raises(ValueError, match=message):
        compare(model, broken(params), EXAMPLES, policies, batch_size=2)
    with pytest.raises(ValueError, match="got no examples"):
        compare(model, params, [], policies)
    with pytest.raises(ValueError, match="batch_size is 0"):
        compare(model, params, EXAMPLES, policies, batch_size=0)
    endless = Transformer(dataclasses.replace(model.config, eos_ids=()))
    with pytest.raises(ValueError, match="the model has no EOS id"):
        compare(endless, params, EXAMPLES, policies)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"max_new_tokens": True}, "max_new_tokens is True, expected a whole number from 1"),
        ({"max_new_tokens": 2**31}, "max_new_tokens is 2147483648"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": -1, "prefill_size": 0}, "batch_size is -1, .*; prefill_size is 0"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"seed": True}, "seed is True"),
        ({"temperature": float("nan")}, "temperature is nan"),
    ],
)
def test_numbers_of_generation(loaded, changes, message):
    model, params = loaded
    with pytest.raises(ValueError, match=message):
        kvjax.generate(model, params, [[2, 3]], **changes)


def test_negative_seeds_and_a_large_top_k_still_generate(loaded):
    model, params = loaded
    settings = {"max_new_tokens": 4, "seed": -1, "temperature": 1.0, "eos_ids": ()}
    one, other = (kvjax.generate(model, params, [[2, 3]], **settings, top_k=k) for k in (0, 2**40))
    assert one.tokens == other.tokens and len(one.tokens[0]) == 4


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"samples": 0}, "samples is 0"),
        ({"samples": True}, "samples is True"),
        ({"length": -1, "seed": -1}, "length is -1, .*; seed is -1"),
    ],
)
def test_the_grid_of_questions(changes, message):
    with pytest.raises(ValueError, match=message):
        make_examples(None, Grid(**changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"context": 0}, "context is 0"),
        ({"new_tokens": -1, "batch": 0}, "new_tokens is -1, .*; batch is 0"),
        ({"latent": (0, 64)}, r"latent\[0\] is 0"),
        ({"latent": (512, -2)}, r"latent\[1\] is -2"),
    ],
)
def test_the_numbers_of_a_plan(changes, message):
    settings = {"context": 1024, "new_tokens": 8, **changes}
    with pytest.raises(ValueError, match=message):
        Request("config.json", "v5e:4x4", **settings)
