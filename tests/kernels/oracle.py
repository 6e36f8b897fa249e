"""Each decode operation against float64 numpy, for any implementation, with NaN in dead slots."""

from contextlib import contextmanager
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

import pallas_kernels
from pallas_kernels import Packed, Quantized, dequantize, quantize
from pallas_kernels.entries import Newer

TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2}


@dataclass(frozen=True)
class Options:
    """What a case asks of an operation besides its shapes; `entries` is a dtype of 8 or 4 bits."""

    dtype: str = "float32"
    entries: str | None = None
    window: int | None = None
    softcap: float | None = None


@contextmanager
def interpreted_tpu(kind: str = "TPU v5 lite", cores: int = 1):
    """Traces are for a TPU, which the interpreter stands in for; as above."""
    params = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", num_cores_or_threads=cores
    )
    with on(kind, "tpu", cores), pltpu.force_tpu_interpret_mode(params):
        yield


@contextmanager
def interpreted_gpu():
    """Traces are for a Hopper GPU, which the interpreter stands in for; as above."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    params = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
    with on("NVIDIA H200", "gpu"), plgpu.force_gpu_interpret_mode(params):
        yield


def on(kind, platform, cores=1, axes=()):
    """Traces are for such a device, or for a mesh of them."""
    device = jax.sharding.AbstractDevice(kind, cores, platform)
    mesh = jax.sharding.AbstractMesh((2,) * len(axes), axes, abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def attend(q, k, v, scale, softcap=None):
    """Softmax attention of one query over k [n, H], v [n, Hv], in float64; zeros without keys."""
    if not len(k):
        return np.zeros(v.shape[-1]), -1e30
    logits = k @ q * scale
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    top = logits.max()
    weights = np.exp(logits - top)
    return weights @ v / weights.sum(), top + np.log(weights.sum())


def queries(rng, shape, dtype):
    """A jax array, and the float64 numpy array of exactly its values."""
    array = rng.standard_normal(shape).astype(jnp.dtype(dtype))
    return jax.device_put(array), array.astype(np.float64)


def entries(rng, shape, options, dead):
    """Cache entries, NaN where dead (the scales, for 8 bits; the ranges, for 4), and what they
    stand for in float64.

    Args:
        dead: bool, of the leading axes of `shape`.
    """
    if options.entries is None:
        array = rng.standard_normal(shape).astype(jnp.dtype(options.dtype))
        exact = array.astype(np.float64)
        array[dead] = np.nan
        return jax.device_put(array), exact
    x = quantize(queries(rng, shape, "float32")[0], jnp.dtype(options.entries))
    if isinstance(x, Packed):
        all_ones = np.where(dead[..., None], np.uint8(0xFF), x.values)  # a 16-bit NaN
        poisoned = Packed(jax.device_put(all_ones), x.width)
        return poisoned, np.asarray(dequantize(x, jnp.float32), np.float64)
    poisoned = Quantized(x.values, jax.device_put(np.where(dead, np.float32(np.nan), x.scale)))
    return poisoned, np.asarray(dequantize(x, jnp.float32), np.float64)


def check(got, expected, dtype):
    got = np.asarray(got).astype(np.float32)
    assert np.isfinite(got).all()
    assert np.abs(got - expected).max() <= TOLERANCE[dtype] * max(np.abs(expected).max(), 1e-9)


def check_both(got, expected, dtype):
    """Of [B, N] pairs of output and logsumexp."""
    out, lse = got
    assert out.dtype == jnp.dtype(dtype) and lse.dtype == jnp.float32
    check(out, np.array([[pair[0] for pair in row] for row in expected]), dtype)
    want = np.array([[pair[1] for pair in row] for row in expected])
    rtol = 2e-2 if dtype == "bfloat16" else 1e-5
    np.testing.assert_allclose(np.asarray(lse), want, rtol=rtol, atol=1e-6)


def check_gqa(lengths, S, N, K, H, options, implementation):
    rng, B = np.random.default_rng(0), len(lengths)
    dead = _dead(lengths, S, options.window)
    q, q64 = queries(rng, (B, N, H), options.dtype)
    spread = np.broadcast_to(dead[:, None], (B, K, S))
    k, k64 = entries(rng, (B, K, S, H), options, spread)
    v, v64 = entries(rng, (B, K, S, H), options, spread)
    got = jax.jit(
        lambda *x: pallas_kernels.gqa_decode(
            *x,
            window=options.window,
            softcap=options.softcap,
            implementation=implementation,
            return_lse=True,
        )
    )(q, k, v, np.asarray(lengths, np.int32))
    expected = [
        [
            attend(
                q64[b, n], k64[b, head, ~dead[b]], v64[b, head, ~dead[b]], H**-0.5, options.softcap
            )
            for n in range(N)
            for head in [n // (N // K)]
        ]
        for b in range(B)
    ]
    check_both(got, expected, options.dtype)


def check_mla(lengths, S, N, L, R, options, implementation):
    rng, B = np.random.default_rng(2), len(lengths)
    dead = _dead(lengths, S, options.window)
    ql, ql64 = queries(rng, (B, N, L), options.dtype)
    qr, qr64 = queries(rng, (B, N, R), options.dtype)
    latent, c64 = entries(rng, (B, S, L), options, dead)
    rope, r64 = entries(rng, (B, S, R), options, dead)
    got = jax.jit(
        lambda *x: pallas_kernels.mla_decode(
            *x,
            0.1,
            window=options.window,
            softcap=options.softcap,
            implementation=implementation,
            return_lse=True,
        )
    )(ql, qr, latent, rope, np.asarray(lengths, np.int32))
    q64, k64 = np.concatenate([ql64, qr64], axis=-1), np.concatenate([c64, r64], axis=-1)
    expected = [
        [
            attend(q64[b, n], k64[b, ~dead[b]], c64[b, ~dead[b]], 0.1, options.softcap)
            for n in range(N)
        ]
        for b in range(B)
    ]
    check_both(got, expected, options.dtype)


def check_ragged(
    starts,
    capacities,
    lengths,
    P,
    G,
    H,
    options,
    implementation,
    align=None,
    hidden=0.0,
    newer=False,
):
    """Static segments where `starts` is a tuple, those of each sequence where it is an array.

    Args:
        hidden: share of the rows that `live` hides, which hold numbers all the same.
        newer: `live` says so by positions, and each sequence by a bound of its own.
    """
    rng, (B, K), dtype = np.random.default_rng(1), lengths.shape, options.dtype
    first = np.broadcast_to(np.asarray(starts), (B, K))
    held = np.clip(lengths, 0, capacities)
    dead = np.ones((B, P), bool)
    for b in range(B):
        for start, length in zip(first[b], held[b], strict=True):
            dead[b, start : start + length] = False
    q, q64 = queries(rng, (B, K * G, H), dtype)
    k, k64 = entries(rng, (B, P, H), options, dead)
    v, v64 = entries(rng, (B, P, H), options, dead)
    live = rng.random((B, P)) >= hidden
    traced = align is not None
    segments = (jnp.asarray(starts), jnp.asarray(capacities)) if traced else (starts, capacities)

    def run(q, k, v, lengths, live, *arrays):
        begins, sizes = arrays or segments
        return pallas_kernels.ragged_gqa_decode(
            q,
            k,
            v,
            begins,
            lengths,
            capacities=sizes,
            live=live,
            scale=0.2,
            softcap=options.softcap,
            implementation=implementation,
            return_lse=True,
            **({"align": align} if traced else {}),
        )

    arrays = segments if traced else ()
    shown = live if hidden else None
    if newer:
        than = 5 * np.arange(B)[:, None]
        positions = rng.integers(1, 1000, (B, P)) * np.where(live, 1, -1) + than
        shown = Newer(*(jnp.asarray(x, jnp.int32) for x in (positions, than)))
    got = jax.jit(run)(q, k, v, np.asarray(lengths), shown, *arrays)
    expected = []
    for b in range(B):
        rows = [
            np.flatnonzero(live[b, start : start + length]) + start
            for start, length in zip(first[b], held[b], strict=True)
        ]
        expected.append(
            [
                attend(q64[b, n], k64[b, rows[n // G]], v64[b, rows[n // G]], 0.2, options.softcap)
                for n in range(K * G)
            ]
        )
    check_both(got, expected, dtype)


def _dead(lengths, slots, window):
    """[B, slots] bool: beyond a sequence's length or outside of its window."""
    lengths, slot = np.clip(lengths, 0, slots)[:, None], np.arange(slots)[None]
    dead = slot >= lengths
    return dead if window is None else dead | (slot < lengths - window)
