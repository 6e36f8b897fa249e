"""Head-ragged attention in plain jnp: windows of a pool that holds other layers' rows as well."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.hlo import copies
from kernels.oracle import Options, check_ragged

import pallas_kernels
from pallas_kernels import Packed, Quantized, dequantize, quantize, reference, xla
from pallas_kernels.entries import Bits, Segments, to_bits
from pallas_kernels.packed import packed_bytes

# Segments of more than a window and of less, which end at the pool's end or come in any order.
POOLS = {
    "in_order": ((0, 70, 73, 300), (70, 3, 227, 90), 390),
    "out_of_order": ((310, 8, 300, 140), (80, 130, 1, 160), 390),
    "smaller_than_a_window": ((8, 0), (32, 7), 40),
    "many_heads": (tuple(range(0, 400, 20)), (20,) * 20, 400),
}


@pytest.mark.parametrize("options", [Options(), Options("bfloat16", "int8", softcap=2.0)])
@pytest.mark.parametrize("pool", POOLS)
def test_segments_in_any_order(pool, options):
    """Whose dead rows, and all rows between them, are NaN."""
    starts, capacities, P = POOLS[pool]
    starts, capacities = (np.stack([x, x]).astype(np.int32) for x in (starts, capacities))
    lengths = (capacities * np.random.default_rng(4).random(capacities.shape)).astype(np.int32)
    lengths[0] = capacities[0]
    for hidden in (0.0, 0.4):
        check_ragged(starts, capacities, lengths, P, 2, 32, options, "xla", 1, hidden)


def pool_of_layers(seed=0, layers=3):
    """Starts and lengths [L, B, K] of all layers in one pool, and its rows."""
    rng, (B, K) = np.random.default_rng(seed), (2, 3)
    capacities = rng.integers(1, 150, (layers, 1, K)).repeat(B, axis=1).astype(np.int32)
    ends = np.cumsum(capacities.swapaxes(0, 1).reshape(B, -1), axis=1, dtype=np.int32)
    ends = ends.reshape(B, layers, K).swapaxes(0, 1)
    lengths = (capacities * rng.random(capacities.shape)).astype(np.int32)
    return ends - capacities, lengths, int(ends.max())


@pytest.mark.parametrize("entries", ["float32", "int8"])
def test_several_queries_see_what_is_shown_to_each(entries):
    starts, lengths, P = pool_of_layers()
    rng, B, T, N, H = np.random.default_rng(1), lengths.shape[1], 5, 6, 16
    q = jnp.asarray(rng.standard_normal((B, T, N, H)), jnp.float32)
    k, v = (jnp.asarray(rng.standard_normal((B, P, H)), jnp.float32) for _ in "kv")
    if entries == "int8":
        k, v = quantize(k, jnp.int8), quantize(v, jnp.int8)
    live = jnp.asarray(rng.random((B, T, P)) < 0.6)
    attend = jax.jit(lambda *x: xla.attend(*x[:5], 0.3, 2.0, *x[5:]))
    for layer in range(3):
        segments = Segments(jnp.asarray(starts[layer]), jnp.asarray(lengths[layer]))
        held = q, k, v, segments, jnp.asarray(lengths[layer])
        for shown in (live, live[:, :1]):
            got = attend(*held, shown)
            for t in range(T):
                row = shown[:, min(t, shown.shape[1] - 1)]
                want = reference.ragged_gqa_decode(q[:, t], *held[1:], 0.3, 2.0, row)
                np.testing.assert_allclose(got[0][:, t], want[0], atol=1e-5)
                np.testing.assert_allclose(got[1][:, t], want[1], rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_bit_patterns_are_the_floats_they_stand_for(dtype):
    starts, lengths, P = pool_of_layers()
    rng, B, N, H = np.random.default_rng(1), lengths.shape[1], 6, 16
    q, k, v = (jnp.asarray(rng.standard_normal(s), dtype) for s in ((B, N, H), *((B, P, H),) * 2))
    bits = to_bits(k), to_bits(v)
    assert isinstance(bits[0], Bits) and bits[0].values.dtype == jnp.uint16
    assert bits[0].shape == k.shape and bits[0].dtype == k.dtype
    np.testing.assert_array_equal(dequantize(bits[0], jnp.float32), k.astype(jnp.float32))
    table = jnp.asarray(starts[1]), jnp.asarray(lengths[1])
    run = jax.jit(lambda q, k, v: pallas_kernels.ragged_gqa_decode(q, k, v, *table, align=1))
    np.testing.assert_array_equal(run(q, *bits), run(q, k, v))


@pytest.mark.parametrize("entries", ["float32", "int8", "int4", "bits"])
def test_nothing_of_the_pools_size_is_copied(entries):
    B, T, K, P, H = 1, 2, 2, 1 << 15, 64
    shape = jax.ShapeDtypeStruct
    pool = {
        "float32": shape((B, P, H), jnp.float32),
        "int8": Quantized(shape((B, P, H), jnp.int8), shape((B, P), jnp.float32)),
        "int4": Packed(shape((B, P, packed_bytes(H)), jnp.uint8), H),
        "bits": Bits(shape((B, P, H), jnp.uint16), jnp.dtype("bfloat16")),
    }[entries]
    dtype = jnp.bfloat16 if entries == "bits" else jnp.float32
    q, table = shape((B, T, 4, H), dtype), shape((B, K), jnp.int32)
    run = jax.jit(
        lambda q, k, v, starts, lengths, live: xla.attend(
            q, k, v, Segments(starts, lengths), lengths, 0.1, None, live
        )
    )
    live = shape((B, T, P), jnp.bool_)
    compiled = run.lower(q, pool, pool, table, table, live).compile()
    assert not copies(compiled.as_text(), P * T)
    assert compiled.memory_analysis().temp_size_in_bytes < P * H
