"""Overflow in float16: every way to a result stops, and says where the numbers were lost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import GQA, LATENTS, MLA, toy
from toys import cast

import kvjax
from eval import likelihood
from kvjax import scoring
from kvjax.decoding import Sampling, sample
from kvjax.example import Example
from kvjax.headkv.measure import score_examples
from kvjax.nn import Transformer
from kvjax.nn.transformer import NO_TOKEN, most_likely
from kvjax.policies.named import parse_policy
from kvjax.scoring import compare, perplexity

LOUD = 60  # the token whose embedding overflows two layers on
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
LOUD_PROMPT = [*PROMPT, LOUD]
ADVICE = "; load the model as bfloat16 or float32"


def model_of(*attention, dtype="float16"):
    """A model whose second layer writes numbers above 65504 where it reads one token."""
    model, params = toy(*attention)
    embedding = np.array(params["embedding"])
    embedding[:, 0], embedding[LOUD, 0] = 0, 1000
    params = {
        name: jax.tree.map(lambda x: np.asarray(x) / 2, part) for name, part in params.items()
    }
    layer = params["layers_1"]
    # The gate sees the first feature alone, whose norm of one token is large.
    down, gate, up = (np.zeros_like(layer["mlp"][name]) for name in ("down", "gate", "up"))
    down[:, 0], gate[0], up[0] = 30_000, 1, 1
    params |= {
        "embedding": embedding,
        "layers_1": layer | {"mlp": {"down": down, "gate": gate, "up": up}},
    }
    config = dataclasses.replace(model.config, eos_ids=(2,))
    return Transformer(config), cast(params, dtype)


MODEL, PARAMS = model_of(GQA, GQA)
EXAMPLE = Example(tuple(LOUD_PROMPT), (7, 8), (2, 4), question_length=2)
HALF = parse_policy("snapkv:kv_size=6,observed=4")
TEXT = np.asarray([[*PROMPT, *PROMPT], [*LOUD_PROMPT, *PROMPT[1:]]], np.int32)

WAYS = {
    "logits of prompt 1": lambda m, p: kvjax.generate(m, p, [PROMPT, LOUD_PROMPT], 3, HALF),
    "logits after the text": lambda m, p: kvjax.compress(m, p, LOUD_PROMPT, HALF),
    "measurements of example 0": lambda m, p: score_examples(m, p, [EXAMPLE], "copying"),
    "logits of example 0 under policy 'full'": lambda m, p: compare(m, p, [EXAMPLE], {}),
    "logits of example 0": lambda m, p: scoring.predictions(m, p, [EXAMPLE], 2),
    "losses of the text": lambda m, p: perplexity(m, p, [TEXT]),
    "log-likelihoods": lambda m, p: likelihood.score_dense(m, p, [PROMPT], [[LOUD, 3]]),
}


@pytest.mark.parametrize("what", WAYS)
def test_every_way_to_a_result_names_dtype_and_layer(what):
    message = rf"^the {what} are not finite: float16 overflows in layer 1 \(GQA\){ADVICE}$"
    with pytest.raises(ValueError, match=message):
        WAYS[what](MODEL, PARAMS)


@pytest.mark.parametrize(
    "way",
    [
        lambda m, p: list(likelihood.dense_losses(m, p, TEXT, 16, 2)),
        lambda m, p: list(likelihood.losses_after_prefix(m, p, TEXT, 6, [HALF], 2)),
        lambda m, p: likelihood.score_compressed(m, p, [PROMPT], [[LOUD, 3]], HALF),
        lambda m, p: score_examples(m, p, [EXAMPLE], "gradient"),
        lambda m, p: kvjax.generate(m, p, [LOUD_PROMPT], 3, temperature=1.0),
    ],
)
def test_the_other_ways_stop_too(way):
    with pytest.raises(ValueError, match=r"are not finite: float16 overflows in layer 1 \(GQA\)"):
        way(MODEL, PARAMS)


def test_without_overflow_nothing_is_said():
    out = kvjax.generate(MODEL, PARAMS, [PROMPT], 3, eos_ids=())
    assert len(out.tokens[0]) == 3
    wide = cast(PARAMS, "float32")
    out = kvjax.generate(MODEL, wide, [LOUD_PROMPT], 3, eos_ids=())
    assert len(out.tokens[0]) == 3 and np.isfinite(perplexity(MODEL, wide, [TEXT]))


@pytest.mark.parametrize(("attention", "kind"), [(MLA, "MLA"), (LATENTS, "EqualCache")])
def test_the_layer_kind(attention, kind):
    model, params = model_of(attention, attention)
    with pytest.raises(ValueError, match=rf"overflows in layer 1 \({kind}\)"):
        kvjax.generate(model, params, [LOUD_PROMPT], 2)


def test_overflow_that_begins_while_decoding():
    """The prompt is fine; the first new token is the one that overflows."""
    shape = PARAMS["lm_head"].shape
    seen = PARAMS | {"lm_head": jax.device_put(np.eye(*shape, dtype="float16"))}
    logits, _ = MODEL.apply({"params": seen}, np.asarray([PROMPT], np.int32))
    head = np.zeros(shape, "float16")
    head[:, LOUD] = np.asarray(logits)[0, -1, : shape[0]]
    params = PARAMS | {"lm_head": jax.device_put(head)}
    assert kvjax.generate(MODEL, params, [PROMPT], 1, eos_ids=()).tokens == [[LOUD]]
    with pytest.raises(ValueError, match=r"logits of prompt 0 are not finite: float16 overflows"):
        kvjax.generate(MODEL, params, [PROMPT], 40, eos_ids=())


def test_weights_that_are_not_finite_are_named():
    params = PARAMS | {
        "layers_0": jax.tree.map(
            lambda x: jax.device_put(np.asarray(x) * np.float16(np.nan)), PARAMS["layers_0"]
        )
    }
    message = "finite: layers_0/attn/k has NaN or infinity in float16; load the model as"
    with pytest.raises(ValueError, match=message):
        kvjax.generate(MODEL, params, [PROMPT], 2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_token_is_made_of_such_logits(bad, temperature):
    logits = jnp.asarray([[0.0, 1.0, 2.0], [0.0, bad, 3.0]], jnp.float32)
    keys = jax.random.split(jax.random.key(0), 2)
    tokens = sample(logits, keys, Sampling.create(temperature, 0, 1e-6))
    assert tokens.tolist() == [2, NO_TOKEN] == most_likely(logits).tolist()
