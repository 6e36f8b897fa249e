"""Hugging Face checkpoints: the only place that knows their names."""

from kvjax.hf.config import config_from_hf, matching
from kvjax.hf.deepseek.checks import check_export
from kvjax.hf.deepseek.export import latent_rms
from kvjax.hf.load import (
    default_dtype,
    layout_of,
    load,
    load_tokenizer,
    open_params,
    read_model,
    read_shape,
    stored_tensors,
)
from kvjax.hf.save import save

__all__ = [
    "check_export",
    "config_from_hf",
    "default_dtype",
    "latent_rms",
    "layout_of",
    "load",
    "load_tokenizer",
    "matching",
    "open_params",
    "read_model",
    "read_shape",
    "save",
    "stored_tensors",
]
