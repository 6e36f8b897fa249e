"""The decoupled conversion of every family: exact where nothing is cut, consistent where it is."""

import dataclasses

import numpy as np
import pytest
from calibrated_toys import T, build, error, forward, whole
from tiny_checkpoints import CASES, COMMON
from toys import random_params

import kvjax
from kvjax.cache import cache_bytes
from kvjax.config import DecoupledConfig, MLAConfig, RopeConfig
from kvjax.hf import config_from_hf
from kvjax.nn import Transformer
from kvjax.nn.transformer import embed
from kvjax.transmla import BEST, calibrate, convert, published
from kvjax.transmla.decoupled import decouple_layers, settle
from kvjax.transmla.streams import Streams

FAMILIES = [name for name in CASES if not name.startswith("deepseek")]
NORMED = {"qwen3", "gemma3_text", "olmo2", "qwen3_moe"}
CLOSED = dataclasses.replace(BEST, refit=False)


@pytest.mark.parametrize("name", FAMILIES)
def test_full_rank_is_exact_in_every_mode(name):
    model, params, stats, tokens, want = build(name)
    for mode in ("post",) if name in NORMED else ("post", "fold"):
        new = convert(
            model, params, method="decoupled", stats=stats, mode=mode, recipe=CLOSED, **whole(model)
        )
        kind = DecoupledConfig if mode == "post" else MLAConfig
        assert all(isinstance(layer.attention, kind) for layer in new[0].config.layers)
        assert error(forward(*new, tokens), want) < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_half_the_cache_decodes_what_the_forward_says(name):
    """Prefill in two pieces and token by token, ragged, against the expanded forward."""
    model, params, stats, tokens, _ = build(name)
    K = model.config.layers[0].attention.num_kv_heads
    H = model.config.layers[0].attention.head_dim
    rope_dim = 4
    sizes = {"kv_rank": K * H - rope_dim, "rope_dim": rope_dim}
    # Least squares take long to compile: once with every shape of output and of logits.
    recipe = BEST if name in ("llama_biases", "gemma2", "qwen3") else CLOSED
    new, weights = convert(model, params, method="decoupled", stats=stats, recipe=recipe, **sizes)
    variables = {"params": weights}
    apply = new.apply
    full = np.asarray(apply(variables, tokens)[0])
    assert np.isfinite(full).all()
    cache = new.init_cache(2, T, "float32")
    numbers = sum(
        K * H - rope_dim + (rope_dim if layer.attention.rope else 0)
        for layer in model.config.layers
    )
    assert cache_bytes(cache) == 2 * T * numbers * 4 + 2 * 4 * len(cache)
    steps = np.arange(16)[None]
    first = np.where(steps < np.array([[16], [9]]), steps, -1).astype(np.int32)
    got, cache = apply(variables, tokens[:2, :16], first, cache)
    np.testing.assert_allclose(got[0], full[0, :16], atol=3e-4 * np.abs(full).max())
    np.testing.assert_allclose(got[1, :9], full[1, :9], atol=3e-4 * np.abs(full).max())
    for step in range(3):
        both = np.stack([tokens[0, 16 + step], tokens[1, 9 + step]])[:, None]
        got, cache = apply(variables, both, cache=cache)
        want = np.stack([full[0, 16 + step], full[1, 9 + step]])
        np.testing.assert_allclose(got[:, 0], want, atol=3e-4 * np.abs(full).max())


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text"])
def test_normed_keys_decode_exactly_over_64_tokens(name):
    model, params, stats, _, _ = build(name)
    new, weights = convert(
        model, params, method="decoupled", stats=stats, mode="post", recipe=CLOSED, **whole(model)
    )
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, model.config.vocab_size, (2, 72)).astype(np.int32)
    want = forward(model, params, tokens)
    apply = new.apply
    cache = new.init_cache(2, 72, "float32")
    _, cache = apply({"params": weights}, tokens[:, :8], cache=cache)
    for step in range(8, 72):
        got, cache = apply({"params": weights}, tokens[:, step : step + 1], cache=cache)
        assert np.abs(np.asarray(got[:, 0]) - want[:, step]).max() < 1e-4


def test_partial_rope_is_full_rank_mla():
    """All of the rank, whatever the metric and the mode, is the model with partial RoPE."""
    model, params, stats, tokens, want = build("llama_biases")
    bases = model.config.layers[0].attention
    rank = 2 * bases.num_kv_heads * bases.head_dim - 8
    seen = []
    for mode, recipe in (("fold", CLOSED), ("post", dataclasses.replace(CLOSED, centred=False))):
        sizes, recipe, mode = settle(model, stats.tokens, None, rank, 8, None, False, mode, recipe)
        for stage in ("partial_rope", "low_rank"):
            new, attentions = dict(params), []
            x = embed(model.config, params, stats.tokens)
            streams = Streams(x, x)
            for layer in decouple_layers(model, params, stats, sizes, recipe, mode, streams):
                config, attn = layer.attention(getattr(layer, stage))
                attentions.append(config)
                new[f"layers_{layer.index}"] = {**params[f"layers_{layer.index}"], "attn": attn}
            converted = Transformer(model.config.with_attention(tuple(attentions)))
            seen.append(forward(converted, new, tokens))
    for other in seen[1:]:
        assert error(other, seen[0]) < 1e-4
    assert error(seen[0], want) > 1e-3  # eight of sixteen components stopped rotating


def test_least_squares_come_closer_to_the_original():
    model, params, stats, _, _ = build("llama")
    sizes = {"kv_rank": 10, "rope_dim": 4}
    want = forward(model, params, stats.tokens)
    distance = {}
    for name, recipe in (("published", published(2)), ("closed", CLOSED), ("best", BEST)):
        new = convert(model, params, method="decoupled", stats=stats, recipe=recipe, **sizes)
        distance[name] = np.square(forward(*new, stats.tokens) - want).mean()
    assert distance["best"] < distance["closed"] < distance["published"]


@pytest.mark.parametrize("heads", [1, 4])
def test_mqa_and_mha(heads):
    case = {**COMMON, **CASES["llama"], "num_key_value_heads": heads}
    model = Transformer(config_from_hf(case))
    params, tokens = random_params(model), build("llama")[3]
    stats = calibrate(model, params, [tokens])
    new = convert(model, params, method="decoupled", stats=stats, recipe=CLOSED, **whole(model))
    assert error(forward(*new, tokens), forward(model, params, tokens)) < 1e-4


@pytest.mark.parametrize("kind", ["yarn", "dynamic"])
def test_scaled_rope_stays_exact(kind):
    rope = {"rope_type": kind, "factor": 4.0, "rope_theta": 1e4}
    rope |= {"original_max_position_embeddings": 16} if kind == "yarn" else {}
    case = {**COMMON, "model_type": "llama", "rope_parameters": rope}
    case["max_position_embeddings"] = 16  # the test's tokens reach beyond it
    model = Transformer(config_from_hf(case))
    params, tokens = random_params(model), build("llama")[3]
    stats = calibrate(model, params, [tokens])
    new = convert(model, params, method="decoupled", stats=stats, recipe=CLOSED, **whole(model))
    assert error(forward(*new, tokens), forward(model, params, tokens)) < 1e-4
    assert new[0].config.context_length == model.config.context_length


def test_exportable_keeps_one_component_of_every_other_frequency():
    model, params, stats, _, _ = build("llama")
    new, _ = convert(
        model, params, method="decoupled", stats=stats, kv_rank=8, rope_dim=4, exportable=True,
        recipe=CLOSED,
    )  # fmt: skip
    for layer in new.config.layers:
        assert isinstance(layer.attention, MLAConfig)
        assert layer.attention.rope.scaling.pairs == (0, 2)


def test_policies_run_on_what_was_converted():
    """A windowed latent layer of which tokens were dropped still sees its window only."""
    model, params, stats, tokens, _ = build("mistral")
    new, weights = convert(
        model, params, method="decoupled", stats=stats, kv_rank=12, rope_dim=4, recipe=CLOSED
    )
    prompts = [tokens[0].tolist(), tokens[1, :17].tolist()]
    full = kvjax.generate(new, weights, prompts, max_new_tokens=6, eos_ids=())
    same = kvjax.generate(
        new,
        weights,
        prompts,
        max_new_tokens=6,
        eos_ids=(),
        policy="streaming:kv_size=16,observed=8",
    )
    # 16 tokens hold all that a window of 7 sees: what was dropped, no query would have seen.
    assert same.tokens == full.tokens
    assert same.cache_bytes < full.cache_bytes


def test_what_is_refused():
    model, params, stats, _, _ = build("llama")
    args = {"method": "decoupled", "stats": stats, "kv_rank": 8, "rope_dim": 4}
    for changes, message in (
        ({"stats": None}, "needs either calibration="),
        ({"stats": build("qwen3")[2]}, "it was made with another model"),
        ({"kv_rank": 29}, r"layer 0: kv_rank is 29, expected 1 to 28 = 2·2·8 − 4"),
        ({"kv_rank": 0}, "kv_rank is 0, expected 1 to 28"),
        ({"rope_dim": 5}, "rope_dim is 5, expected an even number up to 16"),
        ({"rope_dim": 18}, "rope_dim is 18, expected an even number up to 16"),
        ({"kv_rank": [8]}, "got 1 values of kv_rank, expected one or 2"),
        ({"v_head_dim": 0}, "v_head_dim is 0, expected a whole number from 1"),
        ({"v_head_dim": 9, "recipe": CLOSED}, "v_head_dim is given with a recipe"),
        ({"mode": "both"}, "mode is 'both', expected one of auto, fold, post"),
        ({"exportable": True, "rope_dim": 6}, "rope_dim is 6, expected a divisor of 8"),
        ({"recipe": published(1)}, "FreqFold 1 of 4 frequencies cannot keep 2"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(model, params, **{**args, **changes})
    short = dataclasses.replace(stats, tokens=stats.tokens[:1, :6])
    with pytest.raises(ValueError, match="the calibration has 6 tokens, expected at least 8"):
        convert(model, params, **{**args, "stats": short})
    model, params, stats, _, _ = build("qwen3")
    with pytest.raises(ValueError, match=r"the keys have QK-norm, .*expected mode='post'"):
        convert(model, params, **{**args, "stats": stats, "mode": "fold"})
    latent = Transformer(
        model.config.with_attention(
            (MLAConfig(4, 8, 4, 8, 12, None, 0.3, RopeConfig(4)),) * model.config.num_layers
        )
    )
    with pytest.raises(ValueError, match="layer 0 has MLAConfig, expected GQAConfig"):
        convert(latent, random_params(latent), **args)
