"""kvjax makes the KV cache of existing grouped-query LLMs smaller, in JAX."""

from kvjax import transmla
from kvjax.nn import Transformer

__all__ = ["Transformer", "transmla"]
