"""Calls on both sides of what the kernels' memories hold: shapes, which need no memory here."""

import functools

import jax
import jax.numpy as jnp

import pallas_kernels
from pallas_kernels import Quantized
from pallas_kernels.entries import is_quantized


def shape(size, dtype):
    return jax.ShapeDtypeStruct(size, jnp.dtype(dtype))


def entries(size, dtype):
    values = shape(size, dtype)
    return Quantized(values, shape(size[:-1], "float32")) if is_quantized(dtype) else values


def gqa(slots, width, keys, values=None, value_width=None, queries="bfloat16", heads=(8, 2)):
    B, (N, K) = 2, heads
    k = entries((B, K, slots, width), keys)
    v = entries((B, K, slots, value_width or width), values or keys)
    arrays = shape((B, N, width), queries), k, v, shape((B,), "int32")
    return pallas_kernels.gqa_decode, arrays


def ragged(rows, keys, values=None, align=32, live=False, queries="bfloat16", batch=1, heads=8):
    N, H = heads * 4, 128
    k, v = entries((batch, rows, H), keys), entries((batch, rows, H), values or keys)

    def operation(q, k, v, starts, lengths, live=None, **settings):
        settings = {"align": align, "live": live, **settings}
        return pallas_kernels.ragged_gqa_decode(q, k, v, starts, lengths, **settings)

    table = shape((batch, heads), "int32")
    arrays = shape((batch, N, H), queries), k, v, table, table
    return operation, (*arrays, *([shape((batch, rows), "bool")] if live else []))


def mla(batch, heads, slots, rank, rope, latents, ropes=None, queries="bfloat16"):
    q = shape((batch, heads, rank), queries), shape((batch, heads, rope), queries)
    held = entries((batch, slots, rank), latents), entries((batch, slots, rope), ropes or latents)
    operation = functools.partial(pallas_kernels.mla_decode, scale=0.1)
    return operation, (*q, *held, shape((batch,), "int32"))


V5E, V5P, V6E = "TPU v5 lite", "TPU v5", "TPU v6 lite"
PIECE = "MiB of vector memory"
LIST = "scalar memory"
LAYERS = 1 << 22
"""Rows of a pool of many layers."""

# kind of device; what fits; what does not; why; sizes of the kernel
TPU = {
    "scales": (
        V5E,
        ragged(LAYERS, "int8"),
        ragged(LAYERS, "int8"),
        PIECE,
        {"block": 15_360},
        {"block": 32_768},
    ),
    "scales_v6e": (
        V6E,
        ragged(LAYERS, "int8"),
        ragged(LAYERS, "int8"),
        PIECE,
        {"block": 30_720},
        {"block": 65_536},
    ),
    "visible_rows": (
        V5P,
        ragged(LAYERS, "bfloat16", live=True),
        ragged(LAYERS, "bfloat16", live=True),
        PIECE,
        {"block": 12_288},
        {"block": 18_432},
    ),
    "work_list": (
        V6E,
        mla(1, 8, 128 * 257_000, 128, 0, "bfloat16"),
        mla(1, 8, 128 * 262_144, 128, 0, "bfloat16"),
        LIST,
        {"block": 128},
    ),
    "list_of_pools": (
        V5P,
        ragged(1 << 20, "bfloat16", batch=64),
        ragged(1 << 20, "bfloat16", batch=128),
        LIST,
        {},
    ),
    "latents": (
        V5E,
        mla(8, 128, 8192, 512, 64, "float32", queries="float32"),
        mla(8, 128, 8192, 512, 64, "float32", queries="float32"),
        PIECE,
        {"block": 1792},
        {"block": 2560},
    ),
    "query_heads": (
        V5E,
        mla(2, 1024, 1024, 512, 64, "bfloat16"),
        mla(2, 2048, 1024, 512, 64, "bfloat16"),
        PIECE,
        {},
    ),
    "head_dim": (
        V5E,
        gqa(1024, 1024, "float32", queries="float32"),
        gqa(1024, 4096, "float32", queries="float32"),
        PIECE,
        {},
    ),
    "rows_of_values": (
        V6E,
        ragged(4096, "bfloat16", "int8", align=32),
        ragged(4096, "bfloat16", "int8", align=16),
        "multiples of 16 rows, and int8 needs 32",
        {},
    ),
}

# what fits; what does not; why
GPU = {
    "int8": (gqa(1024, 416, "int8"), gqa(1024, 448, "int8"), "shared memory"),
    "int8_widest": (
        gqa(1024, 512, "int8", value_width=128),
        gqa(1024, 512, "int8"),
        "shared memory",
    ),
    "fp8": (
        gqa(1024, 416, "float8_e4m3fn"),
        gqa(1024, 448, "float8_e4m3fn"),
        "shared memory",
    ),
    "bfloat16": (
        gqa(1024, 512, "bfloat16"),
        gqa(1024, 640, "bfloat16", value_width=512),
        "shared memory",
    ),
    "values": (
        gqa(1024, 128, "bfloat16", value_width=512),
        gqa(1024, 128, "bfloat16", value_width=528),
        "registers",
    ),
    "values_of_another_dtype": (
        gqa(1024, 128, "int8"),
        gqa(1024, 128, "bfloat16", "int8"),
        "entries bfloat16, int8",
    ),
    "rope_of_another_dtype": (
        mla(2, 16, 1024, 512, 64, "int8"),
        mla(2, 16, 1024, 512, 64, "int8", "bfloat16"),
        "entries int8, bfloat16",
    ),
    "queries": (
        gqa(1024, 128, "float16", queries="float16"),
        gqa(1024, 128, "float32", queries="float32"),
        "queries of 16 bits",
    ),
    "slots": (
        gqa(1024, 128, "bfloat16"),
        gqa(1020, 128, "bfloat16"),
        "1020 slots are not a multiple of 8",
    ),
}
