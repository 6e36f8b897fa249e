"""Decode attention on dense, head-ragged and latent KV caches. Imports jax only."""

from pallas_kernels.api import gqa_decode, mla_decode, ragged_gqa_decode, schedule
from pallas_kernels.entries import Bits, Quantized, Segments, dequantize, quantize, to_bits
from pallas_kernels.packed import Packed

__all__ = [
    "Bits",
    "Packed",
    "Quantized",
    "Segments",
    "dequantize",
    "gqa_decode",
    "mla_decode",
    "quantize",
    "ragged_gqa_decode",
    "schedule",
    "to_bits",
]
