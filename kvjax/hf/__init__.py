"""Hugging Face checkpoints: the only place that knows their names."""

from kvjax.hf.config import config_from_hf
from kvjax.hf.load import load, load_tokenizer, nonfinite, save

__all__ = ["config_from_hf", "load", "load_tokenizer", "nonfinite", "save"]
