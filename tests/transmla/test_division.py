"""How a conversion divides the cache between latent and rotary key, from the moments alone."""

import dataclasses

import numpy as np
import pytest
from calibrated_toys import build

import kvjax
from kvjax.tasks import perplexity
from kvjax.transmla import BEST, calibrate, convert, published
from kvjax.transmla.decoupled import chosen_rope_dim
from kvjax.transmla.division import division_errors
from kvjax.transmla.layer import gqa_layers
from kvjax.transmla.sizes import rope_dims_to_choose

CLOSED = dataclasses.replace(BEST, refit=False)


def layers(model, params, stats):
    return ((params[f"layers_{i}"]["attn"], own) for i, own in enumerate(stats.layers))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_errors_are_those_of_what_is_cut(name):
    model, params, stats, _, _ = build(name)
    base, attn, own = gqa_layers(model)[0], params["layers_0"]["attn"], stats.layers[0]
    turning = base.num_kv_heads * base.rope.dim
    whole = 2 * base.num_kv_heads * base.head_dim

    def error(numbers, width):
        return division_errors(base, attn, own, numbers, [width], lambda _: CLOSED)[0]

    assert error(whole, turning) < 1e-6  # nothing is cut
    # A smaller latent, and fewer components that rotate, each cost something.
    by_rank = [error(turning + rank, turning) for rank in (2, 6, whole - turning)]
    assert by_rank[0] > by_rank[1] > by_rank[2]
    by_rope = [error(whole, width) for width in (2, 6, turning)]
    assert by_rope[0] > by_rope[1] > by_rope[2]


def test_what_a_conversion_chooses_from():
    bases = gqa_layers(build("llama")[0])  # 2 KV heads of 8: 32 numbers
    assert rope_dims_to_choose(bases, 0.5, None, None, False) == (16, [2, 4, 8, 10])
    assert rope_dims_to_choose(bases, None, None, None, False) == (16, [2, 4, 8, 10])
    assert rope_dims_to_choose(bases, 0.5, None, None, True) == (16, [2, 4, 8])
    for given in ((0.5, None, 4), (None, 12, None)):
        assert rope_dims_to_choose(bases, *given, False) == (0, [])


def test_who_leaves_the_choice_to_the_moments():
    model, params, stats, _, _ = build("llama")
    args = None, None, False
    assert chosen_rope_dim(model, layers(model, params, stats), 0.5, *args, BEST) in (2, 4, 8, 10)
    assert chosen_rope_dim(model, layers(model, params, stats), 0.5, *args, published(1)) is None
    new = convert(model, params, "decoupled", stats=stats, cache=0.5, exportable=True)[0]
    assert new.config.layers[0].attention.qk_rope_head_dim in (2, 4, 8)


@pytest.mark.data
def test_the_choice_on_a_real_checkpoint_is_the_best_one(data_dir):
    directory = data_dir / "checkpoints" / "stories260k"
    model, params = kvjax.load(directory, dtype="float32")
    tokens, held = (np.load(directory / f"{n}.npy") for n in ("calibration", "heldout"))
    stats = calibrate(model, params, [tokens[:64].astype(np.int32)])
    held = [held[:64].astype(np.int32)]

    def loss(**sizes):
        new = convert(model, params, "decoupled", stats=stats, recipe=CLOSED, **sizes)
        return perplexity(*new, held)

    for cache, chosen in ((0.75, 16), (0.5, 10), (0.28125, 6)):
        numbers, others = rope_dims_to_choose(gqa_layers(model), cache, None, None, False)
        got = chosen_rope_dim(model, layers(model, params, stats), cache, None, None, False, CLOSED)
        assert got == chosen
        if cache == 0.5:
            at = others.index(chosen)
            for width in (others[at - 1], others[at + 1]):
                assert loss(cache=cache) < loss(kv_rank=numbers - width, rope_dim=width)
