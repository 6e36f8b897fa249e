"""Bytes of caches, and tokens that heads keep, without running the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eval.batches import Shape
from kvjax.config import GQAConfig, ModelConfig
from kvjax.generation import full_cache_bytes
from kvjax.hf import config_from_hf
from kvjax.nn import Transformer
from kvjax.policies.compression import kept_tokens as tokens_kept
from kvjax.policies.policy import Full, Policy
from kvjax.prefill import shape_bytes
from kvjax.prompts import bucket_length


def policy_bytes(model: Transformer, dtype: Any, policy: Policy, shape: Shape) -> int:
    """Bytes of one sequence's caches after prefill, with room for the answer.

    Args:
        dtype: of the parameters.
        policy: with its head scores, see `kvjax.policies.named.resolve`.
    """
    lengths, dtype = [shape.bucket], jnp.dtype(dtype)
    work = policy.compression(model.config, lengths, shape.max_new_tokens, dtype)
    return shape_bytes(work, bucket_length(shape.bucket))


def uncompressed_bytes(model: Transformer, dtype: Any, shape: Shape) -> int:
    """Bytes of one sequence's uncompressed caches."""
    params = {"embedding": jax.ShapeDtypeStruct((), jnp.dtype(dtype))}
    slots = bucket_length(shape.bucket)
    return full_cache_bytes(model, params, (1, slots), shape.max_new_tokens)


def gqa_bytes(model: Transformer, dtype: Any, shape: Shape) -> int | None:
    """`uncompressed_bytes` before any conversion; None for a model that never was GQA."""
    base = gqa_config(model.config)
    return None if base is None else uncompressed_bytes(Transformer(base), dtype, shape)


def gqa_config(config: ModelConfig) -> ModelConfig | None:
    """The model as it was before its attention was converted; None where it never was GQA.

    Conversions keep the attention they start from, or the config.json that described it.
    """
    base = config.with_attention(tuple(layer.attention.unconverted for layer in config.layers))
    if not _is_gqa(base):
        raw = json.loads(config.hf_json)
        base = config_from_hf(raw) if raw else base
    return base if _is_gqa(base) else None


def kept_tokens(policy: Policy, config: ModelConfig, prompt_len: int, dtype: Any) -> Any:
    """[L][K] tokens that each head keeps of a prompt, its window included; None: everything.

    Of policies with a split these are the budgets that the heads of a layer share.
    """
    if isinstance(policy, Full):
        return None
    return policy.kept(config, prompt_len, jnp.dtype(dtype)).tolist()


def kept_share(policy: Policy, config: ModelConfig, lengths: Sequence[int], dtype: Any) -> float:
    """Share of a prompt's tokens that a head keeps, the mean over heads and prompts."""
    if isinstance(policy, Full):
        return 1.0
    each, counts = np.unique(np.asarray(lengths), return_counts=True)
    work = policy.compression(config, each, 0, jnp.dtype(dtype))
    kept = tokens_kept(config, work.budgets, work.lengths).mean(axis=(1, 2))
    return float(np.average(kept / each, weights=counts))


def _is_gqa(config: ModelConfig) -> bool:
    return all(isinstance(layer.attention, GQAConfig) for layer in config.layers)
