"""kvjax reduces the KV cache of existing grouped-query LLMs, in JAX.

A name is imported when it is first used: `kvjax --help` needs few of them.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_MODULES = {
    "Context": "context",
    "Example": "example",
    "Generation": "generation",
    "TextGeneration": "text_generation",
    "Transformer": "nn",
    "compress": "context",
    "decode_step": "decoding",
    "generate": "generation",
    "generate_text": "text_generation",
    "load": "hf",
    "load_context": "context",
    "load_tokenizer": "hf",
    "prefill": "prefilling",
    "save": "hf",
}
"""The module of each name that is not itself a module."""


def __getattr__(name: str) -> Any:
    module = f"kvjax.{_MODULES.get(name, name)}"
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise  # a package that kvjax needs is missing
        raise AttributeError(f"module 'kvjax' has no attribute {name!r}") from None
    if name not in _MODULES:
        return found
    globals()[name] = getattr(found, name)  # the next use does not come here
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
