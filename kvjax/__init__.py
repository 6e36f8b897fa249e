"""kvjax makes the KV cache of existing grouped-query LLMs smaller, in JAX."""

from kvjax import headkv, tasks, transmla
from kvjax.example import Example
from kvjax.generation import Generation, generate
from kvjax.hf import load, load_tokenizer, save
from kvjax.nn import Transformer

__all__ = [
    "Example",
    "Generation",
    "Transformer",
    "generate",
    "headkv",
    "load",
    "load_tokenizer",
    "save",
    "tasks",
    "transmla",
]
