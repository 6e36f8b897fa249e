"""Decode attention on dense, head-ragged and latent KV caches. Imports jax only."""

from pallas_kernels.api import gqa_decode, mla_decode, ragged_gqa_decode
from pallas_kernels.quantized import Quantized, dequantize, quantize

__all__ = [
    "Quantized",
    "dequantize",
    "gqa_decode",
    "mla_decode",
    "quantize",
    "ragged_gqa_decode",
]
