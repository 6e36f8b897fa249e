"""kvjax makes the KV cache of existing grouped-query LLMs smaller, in JAX."""
