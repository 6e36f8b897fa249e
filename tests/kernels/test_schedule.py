"""One schedule for all layers of a decode step, in a pool that holds the rows of all of them."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.oracle import interpreted_gpu, interpreted_tpu, on

import pallas_kernels
from pallas_kernels import Segments, reference, tables

IMPLEMENTATIONS = {"xla": nullcontext, "pallas_tpu": interpreted_tpu, "pallas_gpu": interpreted_gpu}
LAYERS, B, K, G, H, ALIGN = 2, 2, 2, 2, 64, 16


def segments(seed=0):
    """Starts, capacities and lengths [L, B, K] in one pool, its rows, and a bound of a layer's."""
    rng = np.random.default_rng(seed)
    capacities = np.array([[[700, 30], [17, 600]], [[3, 90], [64, 1]]], np.int32)
    rows = -(-capacities // ALIGN) * ALIGN
    ends = np.cumsum(rows.swapaxes(0, 1).reshape(B, -1), axis=1, dtype=np.int32)
    starts = ends.reshape(B, LAYERS, K).swapaxes(0, 1) - rows
    lengths = rng.integers(1, capacities + 1).astype(np.int32)
    lengths[0, 0] = capacities[0, 0]
    return starts, capacities, lengths, int(ends.max()), int(rows.sum(axis=2).max())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_schedule_changes_nothing(implementation):
    """Nor do the other layers' rows, and dead rows, which are NaN."""
    if implementation == "pallas_gpu" and jax.__version_info__ < (0, 11, 2):
        pytest.skip("jax's interpreter of GPU kernels needs 0.11.2")
    starts, capacities, lengths, P, span = segments()
    rng, dtype = np.random.default_rng(1), jnp.bfloat16
    q = jnp.asarray(rng.standard_normal((B, K * G, H)), dtype)
    pools = [jnp.asarray(rng.standard_normal((B, P, H)), dtype) for _ in "kv"]
    settings = {"align": ALIGN, "span": span, "implementation": implementation}
    with tables.using(shares=1), IMPLEMENTATIONS[implementation]():
        given = {"queries_per_head": G, "k_pool": pools[0], "v_pool": pools[1], **settings}
        schedule = pallas_kernels.schedule(jnp.asarray(starts), jnp.asarray(lengths), **given)
        assert (schedule is None) == (implementation == "xla")
        for layer in range(LAYERS):
            row, live = np.arange(P), np.zeros((B, P), bool)
            for b in range(B):
                for start, length in zip(starts[layer, b], lengths[layer, b], strict=True):
                    live[b] |= (row >= start) & (row < start + length)
            k, v = (jnp.where(jnp.asarray(live)[..., None], x, jnp.nan) for x in pools)
            table, held = Segments(jnp.asarray(starts[layer]), capacities[layer]), lengths[layer]
            run = jax.jit(
                lambda q, k, v, schedule, table=table, held=held: pallas_kernels.ragged_gqa_decode(
                    *(q, k, v, table.starts, jnp.asarray(held)),
                    capacities=jnp.asarray(table.capacities),
                    schedule=schedule,
                    **settings,
                )
            )
            got = run(q, k, v, jax.tree.map(lambda x, layer=layer: x[layer], schedule))
            np.testing.assert_array_equal(got, run(q, k, v, None))
            x = (y.astype(jnp.float32) for y in (q, k, v))
            want, _ = reference.ragged_gqa_decode(*x, table, jnp.asarray(held), H**-0.5, None)
            np.testing.assert_allclose(got.astype(jnp.float32), want, atol=2e-2)


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_the_kernel_makes_no_work_list_where_one_is_given(platform):
    starts, _, lengths, P, span = segments()
    kind = {"tpu": "TPU v6 lite", "gpu": "NVIDIA H200"}[platform]
    pool = jnp.zeros((B, P, H), jnp.bfloat16)
    settings = {"align": ALIGN, "span": span}
    with on(kind, platform):
        schedule = pallas_kernels.schedule(
            jnp.asarray(starts),
            jnp.asarray(lengths),
            queries_per_head=G,
            k_pool=pool,
            v_pool=jax.ShapeDtypeStruct(pool.shape, pool.dtype),
            **settings,
        )
        layer = jax.tree.map(lambda x: x[1], schedule)

        def run(schedule):
            q, held = jnp.zeros((B, K * G, H), jnp.bfloat16), jnp.asarray(lengths[1])
            table = jnp.asarray(starts[1])
            return pallas_kernels.ragged_gqa_decode(
                q, pool, pool, table, held, schedule=schedule, **settings
            )

        with_one, without = (str(jax.make_jaxpr(run)(s)) for s in (layer, None))
    assert "cumsum" in without and without.count("cumsum") > with_one.count("cumsum")
    assert set(np.asarray(schedule.starts).shape) == {LAYERS, B * K}
