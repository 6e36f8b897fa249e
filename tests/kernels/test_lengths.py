"""Lengths beyond the slots, below zero and of any integer dtype, in every implementation."""

from contextlib import nullcontext

import jax
import jax._src.pallas.mosaic.interpret.interpret_pallas_call as interpreter
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.oracle import (
    Options,
    check_gqa,
    check_mla,
    check_ragged,
    interpreted_gpu,
    interpreted_tpu,
    on,
)

import pallas_kernels
from pallas_kernels import tables
from pallas_kernels.entries import Segments

IMPLEMENTATIONS = {"xla": nullcontext, "pallas_tpu": interpreted_tpu, "pallas_gpu": interpreted_gpu}
IN_BFLOAT16 = Options("bfloat16")
# A block of the TPU's kernel has 512 rows, one of the GPU's 64.
LENGTHS, SLOTS = (3000, 600, -7, 601), 600
# Each head's rows end where the next one's begin: what is read beyond them is alive.
STARTS, CAPACITIES, ROWS = (0, 64, 640), (40, 576, 60), 704
HEAD_LENGTHS = np.array([[9000, 577, 61], [41, -1, 65], [64, 10_000_000, 2**31 - 1]], np.int32)


@pytest.fixture(autouse=True)
def no_races():
    yield
    if hasattr(interpreter, "races") and interpreter.races is not None:
        assert not interpreter.races.races_found


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    """Its name, where traces take it."""
    if request.param == "pallas_gpu" and jax.__version_info__ < (0, 11, 2):
        pytest.skip("jax's interpreter of GPU kernels needs 0.11.2")
    with tables.using(shares=1), IMPLEMENTATIONS[request.param]():
        yield request.param


@pytest.mark.parametrize("window", [None, 100])
def test_gqa_decode(implementation, window):
    options = Options("bfloat16", window=window)
    check_gqa(LENGTHS[:3], SLOTS, 4, 2, 64, options, implementation)


def test_mla_decode(implementation):
    check_mla(LENGTHS[1:], SLOTS, 8, 128, 64, IN_BFLOAT16, implementation)


def test_ragged_gqa_decode(implementation):
    check_ragged(STARTS, CAPACITIES, HEAD_LENGTHS, ROWS, 2, 64, IN_BFLOAT16, implementation)


def test_ragged_gqa_decode_with_segments_of_each_sequence(implementation):
    starts, capacities = (np.tile(np.asarray(x, np.int32), (3, 1)) for x in (STARTS, CAPACITIES))
    arguments = (HEAD_LENGTHS, ROWS, 2, 64, IN_BFLOAT16, implementation)
    check_ragged(starts, capacities, *arguments, align=16)


def test_no_segment_passes_its_capacity_or_the_pool():
    starts, capacities = jnp.asarray([[96, 16, 32]]), jnp.asarray([[99, 16, 60]])
    np.testing.assert_array_equal(Segments(starts, capacities, 16).room(128), [[32, 16, 60]])
    np.testing.assert_array_equal(Segments(starts, capacities, 8, span=96).room(104), [[8, 16, 60]])
    outside = Segments(jnp.asarray([[-8, 200, 8]]), jnp.asarray([[5, 5, -1]]), 8)
    np.testing.assert_array_equal(outside.room(128), [[0, 0, 0]])


def test_segments_end_where_the_next_one_starts_by_default():
    """In whatever order they come; [K] starts are those of every sequence."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in POOL_SHAPES)
    starts = jnp.asarray([104, 0, 40], jnp.int32)
    lengths = jnp.full((2, 3), 1000, jnp.int32)
    want = pallas_kernels.ragged_gqa_decode(q, k, v, starts, jnp.asarray([[56, 40, 64]] * 2))
    for given in (starts, jnp.stack([starts] * 2)):
        got = pallas_kernels.ragged_gqa_decode(q, k, v, given, lengths)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
@pytest.mark.parametrize("operation", ["gqa", "mla", "fixed", "of_each_sequence", "bounded"])
def test_work_lists_name_no_block_beyond_the_slots(platform, operation, monkeypatch):
    """Whatever the lengths are: those of a dense cache, and of heads with a bound on their rows."""
    lists, kind = [], {"tpu": "TPU v6 lite", "gpu": "NVIDIA H200"}[platform]

    def attend(x, work, *settings):
        lists.append(work)
        raise StopIteration

    __import__(f"pallas_kernels.{platform}.operations")
    monkeypatch.setattr(f"pallas_kernels.{platform}.operations.attend", attend)
    x, B, H = {"implementation": f"pallas_{platform}"}, 3, 64
    q, pool = jnp.zeros((B, 6, H), jnp.bfloat16), jnp.zeros((B, ROWS, H), jnp.bfloat16)
    lengths, dense = jnp.asarray(HEAD_LENGTHS), jnp.asarray(LENGTHS[:B], jnp.int32)
    tables = (jnp.tile(jnp.asarray(t, jnp.int32), (B, 1)) for t in (STARTS, (999, 577, 99)))
    starts, capacities = tables
    with on(kind, platform), pytest.raises(StopIteration):
        if operation == "gqa":
            k = pool[:, None, :SLOTS]
            pallas_kernels.gqa_decode(q, k, k, dense, **x)
        elif operation == "mla":
            c = pool[:, :SLOTS]
            pallas_kernels.mla_decode(q, q, c, c, dense, 1.0, **x)
        elif operation == "fixed":
            x["capacities"] = CAPACITIES
            pallas_kernels.ragged_gqa_decode(q, pool, pool, STARTS, lengths, **x)
        else:
            x |= {"align": 16, "span": None if operation == "of_each_sequence" else 680}
            x["capacities"] = capacities
            pallas_kernels.ragged_gqa_decode(q, pool, pool, starts, lengths, **x)
    (work,) = lists
    rows = SLOTS if operation in ("gqa", "mla") else ROWS
    assert np.all(np.asarray(work.begins) >= 0) and np.all(work.ends >= work.begins)
    assert np.all(work.starts + work.ends <= rows) and int(work.ends.max()) > 500
    if platform == "tpu":  # an owner for every piece
        assert int(work.bounds[0]) <= work.owners.shape[0]


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32"])
def test_lengths_of_any_integer_dtype(dtype):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in SHAPES)
    lengths = np.asarray([100, np.iinfo(dtype).max], dtype)
    got = pallas_kernels.gqa_decode(q, k, v, jnp.asarray(lengths))
    clipped = np.minimum(lengths.astype(np.int64), 160).astype(np.int32)
    np.testing.assert_array_equal(got, pallas_kernels.gqa_decode(q, k, v, jnp.asarray(clipped)))


def test_lengths_of_64_bits():
    """2³² + 5 is no 5."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in SHAPES)
    want = pallas_kernels.gqa_decode(q, k, v, jnp.asarray([160, 0], jnp.int32))
    with jax.enable_x64(True):
        lengths = jnp.asarray([2**32 + 5, -(2**32) + 5], jnp.int64)
        got = pallas_kernels.gqa_decode(q, k, v, lengths)
    np.testing.assert_array_equal(got, want)


POOL_SHAPES = ((2, 6, 8), (2, 160, 8), (2, 160, 8))
SHAPES = ((2, 4, 8), (2, 2, 160, 8), (2, 2, 160, 8))


def test_lengths_must_be_integers():
    q, k, v = (jnp.zeros(s) for s in SHAPES)
    with pytest.raises(ValueError, match="lengths is of float32, expected an integer dtype"):
        pallas_kernels.gqa_decode(q, k, v, jnp.zeros((2,), jnp.float32))
    with pytest.raises(ValueError, match="window is -1, expected at least 0"):
        pallas_kernels.gqa_decode(q, k, v, jnp.zeros((2,), jnp.int32), window=-1)
    starts = jnp.zeros((3, 2), jnp.int32)
    with pytest.raises(ValueError, match=r"starts is \(3, 2\), expected .* or \(2, KV heads\)"):
        pallas_kernels.ragged_gqa_decode(q, k[:, 0], v[:, 0], starts, jnp.zeros((2, 2), jnp.int32))


@pytest.mark.parametrize("window", [0, 1, 160, 10**12])
def test_windows_of_no_slot_and_of_all(window):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in SHAPES)
    lengths = jnp.asarray([7, 160], jnp.int32)
    got = pallas_kernels.gqa_decode(q, k, v, lengths, window=window)
    want = {
        0: jnp.zeros_like(got),
        1: jnp.repeat(v[jnp.arange(2), :, lengths - 1], 2, axis=1),
    }.get(window, pallas_kernels.gqa_decode(q, k, v, lengths))
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("implementation", ["auto", "xla", "pallas_tpu"])
@pytest.mark.parametrize(("B", "S"), [(0, 16), (2, 0), (0, 0)])
def test_nothing_to_attend_to(B, S, implementation):
    settings = {"implementation": implementation, "return_lse": True}
    q, pool = jnp.ones((B, 4, 8)), jnp.ones((B, S, 8))
    k, none = jnp.ones((B, 2, S, 8)), jnp.zeros((B,), jnp.int32)
    with on("TPU v6 lite", "tpu"):
        results = (
            pallas_kernels.gqa_decode(q, k, k, none, **settings),
            pallas_kernels.mla_decode(q, q, pool, pool, none, 1.0, **settings),
            pallas_kernels.ragged_gqa_decode(
                q, pool, pool, (0, S // 2), jnp.ones((B, 2), jnp.int32), **settings
            ),
        )
    for out, lse in results:
        np.testing.assert_array_equal(out, np.zeros((B, 4, 8)))
        np.testing.assert_array_equal(lse, np.full((B, 4), -1e30, np.float32))
