"""Decode attention on dense, head-ragged and latent KV caches. Imports jax only."""

from pallas_kernels.api import gqa_decode, mla_decode, ragged_gqa_decode

__all__ = ["gqa_decode", "mla_decode", "ragged_gqa_decode"]
