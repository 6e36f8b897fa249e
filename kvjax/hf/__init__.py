"""Hugging Face checkpoints: the only place that knows their names."""

from kvjax.hf.config import config_from_hf
from kvjax.hf.deepseek import latent_rms
from kvjax.hf.export_check import check_export
from kvjax.hf.load import (
    layout_of,
    load,
    load_tokenizer,
    open_params,
    read_model,
    read_shape,
    save,
    stored_tensors,
)
from kvjax.hf.tied import matching

__all__ = [
    "check_export",
    "config_from_hf",
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
