"""The widths of a converted layer where the caller leaves them open, for models of all sizes."""

import dataclasses

import numpy as np
import pytest
from calibrated_toys import build, forward

from kvjax.config import GQAConfig, RopeConfig
from kvjax.transmla import BEST, calibrate, convert
from kvjax.transmla.decoupled import chosen_rope_dim
from kvjax.transmla.sizes import chosen_widths

CLOSED = dataclasses.replace(BEST, refit=False)


def layers(kv_heads, head_dim, rotating=None):
    rope = RopeConfig(head_dim if rotating is None else rotating) if rotating != 0 else None
    return [GQAConfig(2 * kv_heads, kv_heads, head_dim, head_dim**-0.5, rope)] * 2


@pytest.mark.parametrize(
    ("bases", "given", "want"),
    [
        # As published where keys and values have more than 576 numbers; else half of them.
        (layers(8, 128), {}, (448, 128)),
        (layers(8, 128), {"rope_dim": 64}, (448, 64)),
        (layers(3, 64), {}, (144, 48)),
        (layers(4, 8), {}, (24, 8)),
        # A share of the cache, or one of the two widths.
        (layers(3, 64), {"cache": 0.75}, (216, 72)),
        (layers(3, 64), {"cache": 0.28125}, (82, 26)),
        (layers(3, 64), {"cache": 0.75, "rope_dim": 64}, (224, 64)),
        (layers(3, 64), {"cache": 0.75, "rope_dim": (96, 48)}, ([192, 240], (96, 48))),
        (layers(3, 64), {"kv_rank": 140}, (140, 46)),
        (layers(3, 64), {"kv_rank": 380}, (380, 4)),
        # No more than what turns: one number in eight, or none.
        (layers(3, 64, rotating=8), {"cache": 0.75}, (264, 24)),
        (layers(3, 64, rotating=0), {"cache": 0.75}, (288, 0)),
        # Exports need a divisor of the rotating width of a head.
        (layers(3, 64), {"cache": 0.5, "exportable": True}, (160, 32)),
        (layers(8, 64), {"exportable": True}, (448, 64)),
    ],
)
def test_widths_that_are_left_open(bases, given, want):
    arguments = {"cache": None, "kv_rank": None, "rope_dim": None, "exportable": False, **given}
    assert chosen_widths(bases, **arguments) == want


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cache": 0.5, "kv_rank": 12}, "cache is 0.5 and kv_rank is 12, expected one of the two"),
        ({"cache": 0.0}, "cache is 0.0, expected"),
        ({"cache": 50.0}, "cache is 50.0, expected"),
        ({"cache": 0.1, "rope_dim": 8}, "a cache of 3 numbers a token has no room for rope_dim 8"),
    ],
)
def test_widths_that_contradict(given, message):
    model, params, stats, _, _ = build("llama")
    with pytest.raises(ValueError, match=message):
        convert(model, params, "decoupled", stats=stats, **given)


def test_a_share_of_the_cache_and_token_ids_are_enough():
    model, params, stats, tokens, _ = build("llama")
    got = convert(model, params, "decoupled", calibration=stats.tokens, cache=0.5, recipe=CLOSED)
    layers = ((params[f"layers_{i}"]["attn"], own) for i, own in enumerate(stats.layers))
    chosen = chosen_rope_dim(model, layers, 0.5, None, None, False, CLOSED)
    sizes = {"kv_rank": 16 - chosen, "rope_dim": chosen}
    want = convert(model, params, "decoupled", stats=stats, recipe=CLOSED, **sizes)
    assert got[0].config == want[0].config
    np.testing.assert_allclose(forward(*got, tokens), forward(*want, tokens), atol=1e-5)
    both = {"calibration": stats.tokens, "stats": calibrate(model, params, [stats.tokens])}
    for given in ({}, both):
        with pytest.raises(ValueError, match="needs either calibration=token ids"):
            convert(model, params, "decoupled", **given)
