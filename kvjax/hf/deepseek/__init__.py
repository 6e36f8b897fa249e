"""Converted models in the layout of transformers' DeepseekV3ForCausalLM."""
