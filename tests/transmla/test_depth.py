"""How many layers keep their fits: never so many that held-out text has a larger loss."""

import dataclasses

import numpy as np
import pytest
from calibrated_toys import build, forward, loss

import kvjax
from kvjax.transmla import BEST, convert, decoupled
from kvjax.transmla.depth import FittedDepth, best_depth, depths, divided

CLOSED = dataclasses.replace(BEST, refit=False)
SIZES = {"kv_rank": 12, "rope_dim": 4}


@pytest.mark.parametrize(
    ("count", "fitted", "judging"),
    [
        (1, [0], []),
        (2, [0], [1]),
        (9, [0, 1, 2, 3, 4, 5, 6, 8], [7]),
        (128, [i for i in range(128) if i % 8 != 7], [7, 23, 39, 55, 71, 87, 103, 119]),
    ],
)
def test_every_eighth_sequence_is_held_out(count, fitted, judging):
    parts = divided(np.arange(count, dtype=np.int32)[:, None])
    assert [part.ravel().tolist() for part in parts] == [fitted, judging]


def test_the_fits_never_end_above_the_held_out_loss_of_the_closed_form():
    model, params, stats, _, _ = build("llama")
    _, judging = divided(stats.tokens)
    losses = [
        loss(*convert(model, params, "decoupled", stats=stats, recipe=recipe, **SIZES), judging)
        for recipe in (CLOSED, BEST)
    ]
    assert losses[1] <= losses[0] + 1e-6


def test_fits_that_make_things_worse_are_dropped(monkeypatch):
    """A fit that turns every output round stands for one that holds on its own text alone."""
    model, params, stats, tokens, _ = build("llama")
    # Text that the original writes: a model that differs from it more has a larger loss.
    written = kvjax.generate(model, params, tokens[:, :4].tolist(), max_new_tokens=16).tokens
    held_out = np.asarray(written, np.int32)
    kept = convert(model, params, "decoupled", stats=stats, recipe=CLOSED, **SIZES)

    def turned(block, params, layer, *args, **kwargs):
        return dataclasses.replace(layer, out=-20 * layer.out)

    monkeypatch.setattr(decoupled, "refit_outputs", turned)
    got = convert(model, params, "decoupled", stats=stats, recipe=BEST, held_out=held_out, **SIZES)
    assert got[0].config == kept[0].config
    np.testing.assert_array_equal(forward(*got, tokens), forward(*kept, tokens))


class Measured(FittedDepth):
    """Losses are given, one for each measured depth."""

    def __init__(self, layers, losses):
        self.given = iter(losses)
        model, params, *_ = build("llama")
        self.layer = model.config.layers[0].attention, {}
        super().__init__(model, params, [self.layer] * layers, np.zeros((1, 2), np.int32))

    def _loss(self):
        return next(self.given)

    def _run(self, index, attention, x):
        return x


@pytest.mark.parametrize(
    ("losses", "best", "fits"),
    [
        ([3.0, 2.0, 1.0, 0.9, 0.8, 0.7, 0.6], 30, 30),  # at 0, 1, 2, 4, 8, 16 and all layers
        ([3.0, 2.0, 1.0, 0.9, 0.95, 0.99], 4, 16),
        ([3.0, 3.1, 3.2], 0, 2),
        ([3.0, 3.1, 2.9, 3.0, 2.8, 3.1, 3.0], 8, 30),
        ([3.0, np.inf, np.inf], 0, 2),
    ],
)
def test_the_search_ends_after_two_worse_depths(losses, best, fits):
    depth = Measured(30, losses)
    while depth.add(depth.layer):
        pass
    assert (depth.best, depth.done) == (best, fits)
    # Measured all at once they give the same.
    assert depths(30) == [0, 1, 2, 4, 8, 16, 30] and depths(1) == [0, 1] and depths(2) == [0, 1, 2]
    assert best_depth(dict(zip(depths(30), [*losses, 0.0, 0.0, 0.0], strict=False))) == best
