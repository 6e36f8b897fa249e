"""kvjax reduces the KV cache of existing grouped-query LLMs, in JAX."""

from kvjax import headkv, policies, tasks, transmla
from kvjax.context import Context, compress, load_context
from kvjax.decoding import decode_step
from kvjax.example import Example
from kvjax.generation import Generation, generate
from kvjax.hf import load, load_tokenizer, save
from kvjax.nn import Transformer
from kvjax.prefilling import prefill
from kvjax.text_generation import TextGeneration, generate_text

__version__ = "0.1.0"

__all__ = [
    "Context",
    "Example",
    "Generation",
    "TextGeneration",
    "Transformer",
    "compress",
    "decode_step",
    "generate",
    "generate_text",
    "headkv",
    "load",
    "load_context",
    "load_tokenizer",
    "policies",
    "prefill",
    "save",
    "tasks",
    "transmla",
]
