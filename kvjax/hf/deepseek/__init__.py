"""Converted models in the layout of transformers' DeepseekV3ForCausalLM."""

from kvjax.hf.deepseek.export import to_deepseek
from kvjax.hf.deepseek.norm import latent_rms
from kvjax.hf.deepseek.serving import write_serving_files

__all__ = ["latent_rms", "to_deepseek", "write_serving_files"]
