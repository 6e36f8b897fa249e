"""Heads over devices by their bytes, and the segments that follow."""

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from kvjax.cache.head_budget import static_segments
from kvjax.headkv import allocate, load_scores
from pallas_kernels.head_plan import assign_heads, lay_out

PUBLISHED = "Meta-Llama-3-8B-Instruct_retrieval_reasoning_heads.json.gz"


@pytest.mark.data
@pytest.mark.parametrize("kv_size, beta", [(128, 1.01), (1024, 1.2)])
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_the_published_budgets_balance(data_dir, kv_size, beta, devices):
    """At most 10 % above the mean; as they stand one device of eight has 22 % more, and with a pool
    for every layer, which must be as large as its largest head, each has 2.7 times the mean."""
    scores = load_scores(data_dir / "head_scores" / "headkv" / PUBLISHED)
    caps = allocate(scores, kv_size=kv_size, window=8, beta=beta, num_kv_heads=8)
    sizes = np.asarray(caps) + 8
    orders = assign_heads(sizes, devices)
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(8), (len(caps), 1)))
    ordered = np.take_along_axis(sizes, orders, axis=1)
    _, rows = lay_out(tuple(map(tuple, ordered.tolist())), devices, align=16)
    assert rows < 1.1 * sizes.sum() / devices
    if devices == 8:
        plain = sizes.reshape(len(caps), devices, -1).sum(axis=(0, 2))
        assert plain.max() > 1.2 * plain.mean()
        assert sizes.max(axis=1).sum() > 2.6 * plain.mean()


def test_a_segment_in_a_pool_of_several_layers():
    """Every device's part of every layer, wherever it lies, equals the layer alone."""
    rng, B, G, H, devices = np.random.default_rng(1), 2, 2, 16, 4
    layers = ((3, 70, 1, 40, 90, 8, 2, 33), (8,) * 8, (1, 1, 60, 60, 5, 5, 5, 5))
    tables, rows = lay_out(layers, devices, align=8)
    pool = rng.standard_normal((2, B, rows, H)).astype(np.float32)
    for table, capacities in zip(tables, layers, strict=True):
        for device in range(devices):
            own = table.on(device, B)
            q = rng.standard_normal((B, 2 * G, H)).astype(np.float32)
            lengths = rng.integers(0, np.asarray(table.capacities[device]) + 1, (B, 2))
            lengths = jnp.asarray(lengths, jnp.int32)
            assert table.capacities[device] == capacities[2 * device : 2 * device + 2]
            got = pallas_kernels.ragged_gqa_decode(
                *(jnp.asarray(q), *map(jnp.asarray, pool), own.starts, lengths),
                capacities=own.capacities,
                align=own.align,
                span=own.span,
            )
            alone, size = static_segments(table.capacities[device], 8)
            parts = np.zeros((2, B, size, H), np.float32)
            for start, was, many in zip(
                alone.starts, table.starts[device], alone.capacities, strict=True
            ):
                parts[:, :, start : start + many] = pool[:, :, was : was + many]
            want = pallas_kernels.ragged_gqa_decode(
                *(jnp.asarray(q), *map(jnp.asarray, parts), alone.starts, lengths),
                capacities=alone.capacities,
            )
            np.testing.assert_allclose(got, want, atol=1e-5)


def test_devices_must_divide_heads():
    with pytest.raises(ValueError, match="got 6 KV heads, expected a multiple of 4 devices"):
        assign_heads(np.ones((1, 6), np.int64), 4)
    with pytest.raises(ValueError, match="got 6 KV heads, expected a multiple of 4 devices"):
        lay_out(((1,) * 6,), 4, 8)
