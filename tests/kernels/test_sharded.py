"""The operations over several devices equal those on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.oracle import queries

import pallas_kernels
from kvjax.cache.head_budget import static_segments
from kvjax.headkv import allocate, load_scores
from pallas_kernels import sharded
from pallas_kernels.head_plan import plan_heads


@pytest.fixture(scope="module")
def mesh():
    return jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))


def close(got, want):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_gqa_over_heads(mesh):
    rng, B, N, K, S, H = np.random.default_rng(0), 2, 8, 4, 24, 16
    q, k, v = (
        queries(rng, shape, "float32")[0] for shape in ((B, N, H), (B, K, S, H), (B, K, S, H))
    )
    arguments, settings = (q, k, v, jnp.asarray([24, 5], jnp.int32)), {"return_lse": True}
    want = pallas_kernels.gqa_decode(*arguments, **settings)
    close(sharded.gqa_decode(*arguments, mesh=mesh, axis="model", **settings), want)


def test_ragged_over_heads(mesh):
    rng, B, G, H = np.random.default_rng(1), 2, 2, 16
    capacities = (3, 70, 1, 40, 90, 8, 2, 33)
    segments, P = static_segments(capacities, 8)
    plan = plan_heads(capacities, 4, align=8)
    q = queries(rng, (B, 8 * G, H), "float32")[0]
    k, v = (queries(rng, (B, P, H), "float32")[0] for _ in range(2))
    some = rng.integers(0, np.asarray(capacities) + 1)
    lengths = jnp.asarray(np.stack([capacities, some]), jnp.int32)
    settings = {"scale": 0.2, "softcap": 3.0, "return_lse": True}
    want = pallas_kernels.ragged_gqa_decode(
        q, k, v, segments.starts, lengths, capacities=capacities, **settings
    )
    pools = (plan.spread(x, segments) for x in (k, v))
    got = sharded.ragged_gqa_decode(q, *pools, plan, lengths, mesh=mesh, axis="model", **settings)
    close(got, want)
    with pytest.raises(ValueError, match="the plan is for 4 devices, mesh axis 'data' has 2"):
        sharded.ragged_gqa_decode(q, k, v, plan, lengths, mesh=mesh, axis="data")


BATCH, SLOTS = {"batch_axis": "data"}, {"slot_axis": "model"}


@pytest.mark.parametrize("axes", [BATCH, SLOTS, BATCH | SLOTS])
def test_mla_over_sequences_and_slots(mesh, axes):
    """A sequence may end before a device's first slot, or be empty."""
    rng, B, N, L, R, S = np.random.default_rng(2), 4, 4, 16, 8, 24
    shapes = (B, N, L), (B, N, R), (B, S, L), (B, S, R)
    arguments = [queries(rng, shape, "float32")[0] for shape in shapes]
    arguments.append(jnp.asarray([24, 7, 0, 6], jnp.int32))
    settings = {"scale": 0.1, "softcap": 2.0, "return_lse": True}
    want = pallas_kernels.mla_decode(*arguments, **settings)
    close(sharded.mla_decode(*arguments, mesh=mesh, **axes, **settings), want)
    with pytest.raises(NotImplementedError, match="a window reaches over"):
        sharded.mla_decode(*arguments, 0.1, mesh=mesh, slot_axis="model", window=3)


def test_plans_balance_the_published_budgets(data_dir):
    """Two KV heads a device: as good as the best of all pairings, and better than in order."""
    name = "Meta-Llama-3-8B-Instruct_retrieval_reasoning_heads.json.gz"
    scores = load_scores(data_dir / "head_scores" / "headkv" / name)
    caps = allocate(scores, kv_size=1024, window=8, beta=1.01, num_kv_heads=8) + 8
    planned = np.array([plan_heads(layer.tolist(), 4).rows for layer in caps])
    in_order = caps.reshape(len(caps), 4, 2).sum(axis=2).max(axis=1)
    best = np.array([_best_of_all(layer) for layer in caps[:4]])
    assert planned.sum() < 0.9 * in_order.sum()
    np.testing.assert_array_less(planned[:4], 1.02 * best + 64)


def _best_of_all(sizes):
    """The smallest largest sum of pairs, by trying all pairings of eight."""

    def pairings(heads):
        if not heads:
            yield []
        for i in range(1, len(heads)):
            rest = heads[1:i] + heads[i + 1 :]
            for others in pairings(rest):
                yield [(heads[0], heads[i]), *others]

    return min(max(sizes[a] + sizes[b] for a, b in pairs) for pairs in pairings(list(range(8))))


def test_plans_need_as_many_heads_on_every_device():
    with pytest.raises(ValueError, match="6 KV heads, expected a multiple of 4 devices"):
        plan_heads([1] * 6, 4)
