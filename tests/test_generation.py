"""kvjax.generate: batches equal single prompts, buckets don't recompile, EOS, sampling, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import counted
from toys import forward, random_params

from kvjax.cache import cache_bytes
from kvjax.cache.storage import room_bucket
from kvjax.config import (
    DynamicScaling,
    GQAConfig,
    LayerConfig,
    MLAConfig,
    MLPConfig,
    ModelConfig,
    RopeConfig,
)
from kvjax.decoding import Sampling, sample
from kvjax.generation import bucket_length, generate
from kvjax.nn import Transformer

V = 89  # most tests ask four prompts of one bucket, so that they share their programs
GQA = GQAConfig(4, 2, 8, 8**-0.5, RopeConfig(8))


def build(attention=GQA, **config):
    layers = tuple(LayerConfig(attention, MLPConfig(32)) for _ in range(2))
    model = Transformer(
        ModelConfig("llama", V, 32, layers, max_position_embeddings=160, eos_ids=(0,), **config)
    )
    return model, random_params(model)


def prompts_of(*lengths, seed=3):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, V, n).tolist() for n in lengths]


def greedy_by_full_forward(model, params, prompt, steps):
    """The oracle: one full forward a token, always at the same padded length."""
    ids = list(prompt)
    for _ in range(steps):
        tokens = np.zeros((1, 96), np.int32)
        tokens[0, : len(ids)] = ids
        logits = forward(model, params, tokens)
        ids.append(int(np.asarray(logits)[0, len(ids) - 1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "attention",
    [GQA, MLAConfig(4, 8, 4, 8, 12, None, 12**-0.5, RopeConfig(4))],
    ids=["gqa", "mla"],
)
def test_greedy_equals_repeated_full_forward(attention):
    model, params = build(attention)
    prompts = prompts_of(5, 31, 20, 1)
    out = generate(model, params, prompts, max_new_tokens=40, eos_ids=())
    for prompt, tokens in zip(prompts, out.tokens, strict=True):
        assert tokens == greedy_by_full_forward(model, params, prompt, 40)


@pytest.mark.parametrize(
    "policy", ["full", "snapkv:kv_size=12,observed=4", "streaming:kv_size=12,observed=4"]
)
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_a_batch_gives_each_prompt_what_it_gets_alone(policy, temperature):
    model, params = build()
    prompts = prompts_of(5, 20, 31, 32)
    settings = {
        "max_new_tokens": 12,
        "policy": policy,
        "temperature": temperature,
        "eos_ids": (),
        "seed": 7,
    }
    together = generate(model, params, prompts, **settings)
    alone = [generate(model, params, [prompt], **settings).tokens[0] for prompt in prompts]
    assert together.tokens == alone


def test_equal_prompts_are_sampled_independently():
    model, params = build()
    (prompt,) = prompts_of(9)
    out = generate(model, params, [prompt] * 4, 24, temperature=2.0, eos_ids=())
    assert len({tuple(tokens) for tokens in out.tokens}) == 4
    again = generate(model, params, [prompt] * 4, 24, temperature=2.0, eos_ids=())
    assert again.tokens == out.tokens
    other = generate(model, params, [prompt] * 4, 24, temperature=2.0, eos_ids=(), seed=1)
    assert other.tokens != out.tokens


def test_lengths_within_a_bucket_do_not_recompile():
    model, params = build()
    generate(model, params, prompts_of(33, 40), max_new_tokens=4, eos_ids=())
    with counted() as programs:
        generate(model, params, prompts_of(48, 35, seed=5), 4, eos_ids=(), temperature=0.7, top_k=5)
    assert programs.compiled == []


def test_buckets():
    assert [bucket_length(n) for n in (1, 32, 33, 48, 49, 64, 65, 1000, 1024, 1025)] == [
        *(32, 32, 48, 48, 64, 64, 96, 1024, 1024, 1536)
    ]


def test_eos_ends_a_sequence_and_is_not_returned():
    model, params = build()
    prompts = prompts_of(6, 11, 20, 31)
    free = generate(model, params, prompts, max_new_tokens=38, eos_ids=()).tokens
    stop = free[0][3]
    out = generate(model, params, prompts, max_new_tokens=38, eos_ids=(stop, V - 1)).tokens
    for got, expected in zip(out, free, strict=True):
        ends = [i for i, token in enumerate(expected) if token in (stop, V - 1)]
        assert got == expected[: ends[0] if ends else 38]
    assert len(out[0]) == 3


def test_streaming_delivers_every_token_once_and_in_order():
    model, params = build()
    seen = []
    prompts = prompts_of(6, 11, 20, 31)
    stream = lambda index, ids: seen.append((index, *ids))  # noqa: E731
    out = generate(model, params, prompts, 38, eos_ids=(), on_tokens=stream)
    steps = zip(*out.tokens, strict=True)
    assert seen == [(index, token) for step in steps for index, token in enumerate(step)]


def test_cache_bytes_are_the_arrays_bytes():
    model, params = build()
    out = generate(model, params, prompts_of(40, 33), max_new_tokens=4)
    caches = model.init_cache(2, 48 + room_bucket(4), "float32")
    assert out.cache_bytes == cache_bytes(caches) + 2 * 4  # and each prompt's whole length
    assert out.full_cache_bytes == out.cache_bytes


def test_length_dependent_rope_is_fixed_for_the_whole_generation():
    rope = RopeConfig(8, scaling=DynamicScaling(2.0, 16))
    model, params = build(GQAConfig(4, 2, 8, 8**-0.5, rope))
    (prompt,) = prompts_of(12)
    tokens = generate(model, params, [prompt], max_new_tokens=20, eos_ids=()).tokens[0]
    ids, lengths = np.asarray([prompt + tokens[:-1]], np.int32), np.asarray([32], np.int32)
    logits = forward(model, params, ids, rope_lengths=lengths)
    assert tokens == np.argmax(np.asarray(logits)[0, 11:], axis=-1).tolist()


def test_top_k_and_top_p_keep_the_likely_tokens_only():
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))
    keys = jax.random.split(jax.random.key(0), 400)

    def drawn(temperature, top_k, top_p):
        settings = Sampling.create(temperature, top_k, top_p)
        batch = jnp.broadcast_to(logits, (400, 4))
        return np.bincount(np.asarray(jax.jit(sample)(batch, keys, settings)), minlength=4)

    assert (drawn(0.0, 0, 1.0) == [400, 0, 0, 0]).all()
    full = drawn(1.0, 0, 1.0)
    assert np.abs(full / 400 - [0.5, 0.3, 0.15, 0.05]).max() < 0.07
    assert (drawn(1.0, 2, 1.0)[2:] == 0).all() and drawn(1.0, 2, 1.0)[1] > 0
    nucleus = drawn(1.0, 0, 0.7)
    assert nucleus[1] > 0 and (nucleus[2:] == 0).all()
    assert drawn(1.0, 0, 0.05)[0] == 400


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [[1], []]}, "prompt 1 is empty, expected at least one token"),
        ({"prompts": []}, "got no prompts"),
        ({"prompts": [[1] * 150], "max_new_tokens": 11}, "150 tokens .* at most 160 in all"),
        ({"prompts": [[1, V]]}, f"prompt 0 has token {V}, expected ids of 0 to {V - 1}"),
        ({"prompts": [[-1]]}, "prompt 0 has token -1"),
        ({"prompts": [[1]], "max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"prompts": [[1]], "temperature": -1.0}, "temperature is -1.0"),
        ({"prompts": [[1]], "top_p": 0.0}, "top_p is 0.0"),
        ({"prompts": [[1]], "top_k": -2}, "top_k is -2"),
    ],
)
def test_bad_input_is_one_clear_error(arguments, message):
    model, params = build()
    with pytest.raises(ValueError, match=message):
        generate(model, params, **arguments)
