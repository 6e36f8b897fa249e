"""Few sizes for many layers: nothing is held beyond the total, and the loss decides."""

import dataclasses
import itertools

import numpy as np
import pytest
from toys import random_params

from kvjax.config import GQAConfig, LayerConfig, MLPConfig, ModelConfig, RopeConfig
from kvjax.nn import Transformer
from kvjax.nn.transformer import block_kinds
from kvjax.transmla import BEST, allocate_sizes, allocation, calibrate, convert
from kvjax.transmla.allocation import few_sizes, groups, mergers
from kvjax.transmla.sizes import Sizes

STEP = 4
START = [Sizes(*size, 8) for size in ((12, 4), (16, 4), (8, 8), (20, 0), (12, 4), (4, 16))]
WANTED = np.array([(13, 4), (19, 2), (7, 8), (24, 0), (12, 5), (6, 14)])


def numbers(sizes):
    return sum(size.rank + size.rope_dim for size in sizes)


def distance(changes):
    """A loss that each layer adds to, least for the sizes that it wants."""
    sizes = [changes.get(layer, size) for layer, size in enumerate(START)]
    found = np.array([(size.rank, size.rope_dim) for size in sizes])
    return float(((found - WANTED) ** 2).sum())


def always(layer, size):
    return size.rank >= 1


@pytest.mark.parametrize("most", [1, 2, 3, 4])
def test_sizes_are_few_and_hold_no_more(most):
    sizes = few_sizes(START, STEP, always, distance, most)
    assert len(groups(sizes)) == most and numbers(sizes) <= numbers(START)
    for size in sizes:
        assert size.rank % STEP == 0 and size.rope_dim % STEP == 0 and size.v_head_dim == 8


def test_the_sizes_that_become_one_are_those_with_the_least_loss():
    one_less = few_sizes(START, STEP, always, distance, 4)
    changed = {layer: size for layer, size in enumerate(one_less) if size != START[layer]}
    assert distance(changed) == min(distance(choice) for choice in mergers(START, STEP))
    # Every pair of sizes was a choice, with every rope_dim between its two.
    pairs = itertools.combinations(groups(START), 2)
    assert len(list(mergers(START, STEP))) == sum(abs(a[1] - b[1]) // STEP + 1 for a, b in pairs)


def test_few_sizes_stay_as_they_are():
    sizes = [START[0], START[1], START[0]]
    assert few_sizes(sizes, STEP, always, lambda changes: 0.0) == sizes


def test_layers_without_a_size_in_common_keep_their_own():
    """Layers without RoPE have no rotary key, the others here need one."""

    def possible(layer, size):
        return (size.rope_dim == 0) == (layer == 3)

    assert len(groups(few_sizes(START, STEP, possible, distance, 1))) == 2


def test_a_model_gets_three_sizes(monkeypatch):
    layer = LayerConfig(GQAConfig(4, 2, 8, 8**-0.5, RopeConfig(8)), MLPConfig(24))
    model = Transformer(ModelConfig("llama", vocab_size=67, hidden_size=32, layers=(layer,) * 6))
    params = random_params(model)
    rng = np.random.default_rng(0)
    fit, held = (rng.integers(0, 67, shape).astype(np.int32) for shape in ((8, 24), (4, 24)))
    stats = calibrate(model, params, [fit])
    closed = dataclasses.replace(BEST, refit=False)
    found = []

    def watched(sizes, *rest):
        found.append(groups(sizes))
        return few_sizes(sizes, *rest)

    monkeypatch.setattr(allocation, "few_sizes", watched)
    options = {"kv_rank": 12, "rope_dim": 4, "step": 2, "recipe": closed, "rounds": 1}
    ranks, ropes = allocate_sizes(model, params, stats, held, **options)
    assert len(found[0]) > 3
    assert len(set(zip(ranks, ropes, strict=True))) <= 3
    assert sum(ranks) + sum(ropes) <= 6 * 16
    new, _ = convert(
        model, params, "decoupled", stats=stats, recipe=closed, kv_rank=ranks, rope_dim=ropes
    )
    assert len({kind.block for kind in block_kinds(new.config)}) <= 3
