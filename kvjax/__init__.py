"""kvjax makes the KV cache of existing grouped-query LLMs smaller, in JAX."""

from kvjax import headkv, tasks, transmla
from kvjax.context import Context, compress, load_context
from kvjax.example import Example
from kvjax.generation import Generation, generate
from kvjax.hf import load, load_tokenizer, save
from kvjax.nn import Transformer

__all__ = [
    "Context",
    "Example",
    "Generation",
    "Transformer",
    "compress",
    "generate",
    "headkv",
    "load",
    "load_context",
    "load_tokenizer",
    "save",
    "tasks",
    "transmla",
]
