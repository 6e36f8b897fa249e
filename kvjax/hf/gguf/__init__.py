"""Models in GGUF files, as llama.cpp writes them: configuration, weights and tokenizer."""

from kvjax.hf.gguf.tensors import open_params, read_config, stored_tensors
from kvjax.hf.gguf.tokenizer import load_tokenizer

__all__ = ["load_tokenizer", "open_params", "read_config", "stored_tensors"]
