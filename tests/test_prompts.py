"""Prompts and end ids of the kinds that people pass: taken, or refused in one line."""

import inspect

import jax.numpy as jnp
import numpy as np
import pytest
from eval_toys import CONTEXT, VOCAB, config

import kvjax
from kvjax.checks import check_prompts, eos_array
from kvjax.config import GQAConfig, LayerConfig, MLPConfig, ModelConfig
from kvjax.nn import Transformer, param_shapes
from kvjax.nn.checks import (
    check_beside,
    check_cache,
    check_fits,
    check_params_fit,
    check_tokens,
)
from kvjax.prefilling import checked_prompts
from kvjax.tasks.words import to_transformers


def check(prompts, max_new_tokens):
    """`check_prompts` for the toy model."""
    check_prompts(prompts, max_new_tokens, config().vocab_size, config().context_length)


TOKENIZER = to_transformers(VOCAB, CONTEXT)
LISTS = "expected a list of lists of token ids"
IDS = "expected a list of token ids"


@pytest.mark.parametrize(
    "prompts",
    [
        [[1, 5], (6,)],
        ([7], range(4, 9)),
        np.array([[1, 5], [6, 7]]),
        [np.array([1, 5], np.uint8), np.arange(3)],
        jnp.array([[1, 5]]),
        [jnp.array([1, 5]), [jnp.int32(1), np.int64(2), 3]],
        np.array([[1, 5], [6]], dtype=object),
    ],
)
def test_whole_numbers_are_prompts(prompts):
    check(prompts, 4)
    with pytest.raises(ValueError, match=f"expected ids of 0 to {VOCAB.size - 1}"):
        check([*prompts, [VOCAB.size]], 4)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("mary", f"prompts: got text, {LISTS}: encode it with kvjax.load_tokenizer"),
        (["mary"], "prompt 0: got text, expected .*: encode it with kvjax.load_tokenizer"),
        ([[1], b"mary"], "prompt 1: got text"),
        ([["mary", "sings"]], f"prompt 0: got text among the token ids, {IDS}"),
        ([1, 5, 6], rf"prompt 0: got 1, {IDS} \(prompts are a list of such lists\)"),
        (np.arange(3), f"prompt 0: got 0, {IDS}"),
        (jnp.arange(3), f"prompt 0: got .*, {IDS}"),
        (
            TOKENIZER(["mary"]),
            r"prompts: got BatchEncoding, .*: pass tokenizer\(...\)\['input_ids'",
        ),
        ([TOKENIZER("mary")], "prompt 0: got BatchEncoding"),
        ({"input_ids": [[1]]}, "prompts: got dict"),
        (None, f"prompts: got None, {LISTS}"),
        (5, "prompts: got 5"),
        (np.array(5), "prompts: got ndarray"),
        (([i] for i in range(3)), "prompts: got generator"),
        ({(1, 5)}, "prompts: got set"),
        ([(i for i in range(3))], "prompt 0: got generator"),
        ([None], "prompt 0: got None"),
        ([[1, None]], "prompt 0: got None among the token ids"),
        ([[1, 5.0]], "prompt 0: got 1.0 among the token ids"),
        ([np.ones(2)], "prompt 0: got 1.0"),
        ([jnp.ones(2, jnp.bfloat16)], "prompt 0: got 1.0"),
        ([[True, False]], "prompt 0: got True"),
        ([[[1, 5]]], r"prompt 0: got ids of shape \(1, 2\)"),
        ([[[1], [5, 6]]], "prompt 0: got lists of different lengths"),
        (np.ones((1, 1, 3), int), r"prompt 0: got ids of shape \(1, 3\)"),
        ([[2**70]], f"prompt 0 has token {2**70}, expected ids of 0 to"),
        ([[5, -(2**70)]], f"prompt 0 has token -{2**70}"),
        ([np.array([2**63], np.uint64)], f"prompt 0 has token {2**63}"),
        ([[1], []], "prompt 1 is empty"),
        ([np.zeros(0)], "prompt 0 is empty"),
        (np.zeros((0, 3), int), "got no prompts"),
    ],
)
def test_other_prompts_are_refused_in_one_line(prompts, message):
    with pytest.raises(ValueError, match=message) as caught:
        check(prompts, 4)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("new", ["64", 4.0, None, [4], 0, -1])
def test_a_length_that_is_no_whole_number(new):
    with pytest.raises(ValueError, match=r"max_new_tokens is .*, expected a whole number ≥ 1"):
        check([[1]], new)


@pytest.mark.parametrize(
    ("eos_ids", "expected"),
    [
        (None, [2]),
        ((), []),
        (5, [5]),
        (np.int64(5), [5]),
        (np.array(5), [5]),
        (jnp.int32(5), [5]),
        ([5, 6], [5, 6]),
        ({6, 5}, [5, 6]),
        (np.array([5, 6]), [5, 6]),
        (jnp.array([5]), [5]),
        ([5, -1, VOCAB.size], [5, -1, VOCAB.size]),
    ],
)
def test_end_ids(eos_ids, expected):
    ids = eos_array(eos_ids, config().eos_ids)
    assert ids.dtype == np.int32 and ids.tolist() == expected


@pytest.mark.parametrize("eos_ids", ["</s>", [2.0], 2.5, True, [[2]], [None], [2**40], {"a": 2}])
def test_other_end_ids_are_refused_in_one_line(eos_ids):
    with pytest.raises(ValueError, match="eos_ids"):
        eos_array(eos_ids, config().eos_ids)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[1, 2]], "got tokens list"),
        (None, "got tokens NoneType"),
        (np.ones((1, 2)), r"got tokens float64 \(1, 2\)"),
        (jnp.ones((1, 2), bool), r"got tokens bool \(1, 2\)"),
        (jnp.ones(2, jnp.int32), r"got tokens int32 \(2,\)"),
        (jnp.ones((1, 1, 2), jnp.int32), r"got tokens int32 \(1, 1, 2\)"),
    ],
)
def test_what_a_model_reads(tokens, message):
    with pytest.raises(ValueError, match=f"{message}, expected an integer array"):
        check_tokens(tokens)


def test_the_public_functions_refuse_text():
    from eval_toys import loaded

    toy = loaded()
    # The types are checked in tests before the functions are; users have only the functions.
    generate, compress = inspect.unwrap(kvjax.generate), inspect.unwrap(kvjax.compress)
    with pytest.raises(ValueError, match="prompt 0: got text"):
        generate(toy.model, toy.params, ["mary sings"])
    with pytest.raises(ValueError, match="prompt 0: got text"):
        compress(toy.model, toy.params, "mary sings", "snapkv:kv_size=12")
    with pytest.raises(ValueError, match="eos_ids: got text"):
        generate(toy.model, toy.params, [[1, 5]], eos_ids="<eos>")


def test_parameters_of_another_model_are_named():
    attention = GQAConfig(2, 1, 2, scale=1.0, rope=None)
    small = ModelConfig("llama", 8, 4, (LayerConfig(attention, MLPConfig(3)),))
    params = param_shapes(small)
    check_params_fit(small, params)
    for other, message in (
        ({"params": params}, r"expected the dict inside: params\['params'\]"),
        ("model", "params is str, expected the dict"),
        ({**params, "layers_1": params["layers_0"]}, "layers_1 is unknown"),
        (
            {**params, "embedding": np.ones((8, 5))},
            r"embedding has shape \(8, 5\), expected \(8, 4",
        ),
        ({**params, "layers_0": {}}, "layers_0/.* is missing; .*; and 2 more"),
    ):
        with pytest.raises(ValueError, match=message):
            check_params_fit(small, other)
    with pytest.raises(ValueError, match=r"model is dict, expected a kvjax\.Transformer"):
        check_fits(params, small)


def test_arrays_beside_the_tokens_have_their_shape():
    tokens = np.ones((2, 3), np.int32)
    check_beside(tokens, positions=None, segment_ids=tokens)
    for value, got in ((tokens[:1], r"int32 \(1, 3\)"), (tokens + 0.5, "float"), ([1], "list")):
        with pytest.raises(ValueError, match=rf"got positions {got}.*array \(2, 3\), as tokens"):
            check_beside(tokens, positions=value)


@pytest.mark.parametrize("lengths", [[4], [0], [2, 2], [1.5], 2])
def test_prefill_refuses_lengths_that_are_none(lengths):
    with pytest.raises(ValueError, match=r"lengths is .*, expected \[1\] integers from 1 to 3"):
        checked_prompts(np.ones((1, 3), np.int32), lengths, 8)


def test_prefill_reads_no_padding():
    ids, lengths = checked_prompts([[5, 6, -1], [7, 99, 99]], [2, 1], 8)
    assert (ids.tolist(), lengths.tolist()) == ([[5, 6, 0], [7, 0, 0]], [2, 1])
    with pytest.raises(ValueError, match="tokens has token 99, expected ids of 0 to 7"):
        checked_prompts([[5, 99]], [2], 8)


def test_a_cache_of_another_model_is_refused():
    attention = GQAConfig(2, 1, 2, scale=1.0, rope=None)
    small = ModelConfig("llama", 8, 4, (LayerConfig(attention, MLPConfig(3)),))
    cache = Transformer(small).init_cache(2, 5)
    check_cache(small, cache, 2)
    for given, message in (
        ([*cache, *cache], "a cache of 2 layers, expected 1"),
        (cache, "a cache for 2 sequences, expected 3, as tokens"),
        (5, "a cache of int, expected 1"),
    ):
        with pytest.raises(ValueError, match=message):
            check_cache(small, given, 3)
