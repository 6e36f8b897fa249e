"""kvjax makes the KV cache of existing grouped-query LLMs smaller, in JAX."""

from kvjax import transmla
from kvjax.hf import load, load_tokenizer, save
from kvjax.nn import Transformer

__all__ = ["Transformer", "load", "load_tokenizer", "save", "transmla"]
