"""The attention of real models, in the numbers that decode depends on: for benchmarks and tests."""

from typing import NamedTuple


class Gqa(NamedTuple):
    """Query heads, KV heads, head dim."""

    N: int
    K: int
    H: int


class Mla(NamedTuple):
    """Query heads, latent rank, rope dim."""

    N: int
    L: int
    R: int


GQA = {
    "llama-3-8b": Gqa(32, 8, 128),
    "qwen2.5-7b": Gqa(28, 4, 128),
    "llama-2-7b": Gqa(32, 32, 128),
    "needle": Gqa(8, 4, 32),
}
"""Grouped-query attention; "needle" is the embedded model."""

MLA = {
    "deepseek-v3": Mla(128, 512, 64),
    "llama-3-8b-transmla": Mla(32, 448, 128),
}
"""Latent attention; the second is what `kvjax.transmla.convert` makes of Llama-3-8B by default."""
