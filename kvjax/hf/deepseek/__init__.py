"""Converted models in the layout of transformers' DeepseekV3ForCausalLM."""

from kvjax.hf.deepseek.export import to_deepseek
from kvjax.hf.deepseek.norm import latent_rms

__all__ = ["latent_rms", "to_deepseek"]
