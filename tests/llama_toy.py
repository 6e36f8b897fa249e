"""A small checkpoint on disk, as users have them: random weights, a config and a tokenizer."""

from toys import random_params

import kvjax
from kvjax.hf import config_from_hf
from kvjax.nn import Transformer

TINY = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
}
"""A config.json for tests of files, which need no text."""
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 8
"""The shape of `save_llama`'s model."""


def save_llama(path, tokenizer, vocab_size, context) -> None:
    """A random llama in Hugging Face layout, with its tokenizer."""
    config = config_from_hf(
        {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "vocab_size": vocab_size,
            "max_position_embeddings": context,
            "rms_norm_eps": 1e-6,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": False,
            "dtype": "float32",
        }
    )
    model = Transformer(config)
    kvjax.save(model, random_params(model), path, layout="hf")
    tokenizer.save_pretrained(path)
