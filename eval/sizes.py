"""Bytes of caches, and tokens that heads keep, without running the model."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from eval.batches import Shape
from kvjax.config import GQAConfig, ModelConfig
from kvjax.decoding import prefill
from kvjax.generation import full_cache_bytes
from kvjax.headkv.plan import CompressedPlan, unconverted
from kvjax.headkv.policy import Policy
from kvjax.hf import config_from_hf
from kvjax.nn import Transformer
from kvjax.prompts import bucket_length
from kvjax.sharding import param_shapes


def policy_bytes(model: Transformer, dtype: Any, policy: Policy, shape: Shape) -> int:
    """Bytes of one sequence's caches after prefill, with room for the answer.

    Args:
        dtype: of the parameters.
        policy: with its head scores, see `kvjax.headkv.policy.resolve`.
    """
    plan = policy.plan(model.config, shape.bucket, jnp.dtype(dtype))
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), param_shapes(model)
    )
    read = functools.partial(prefill, model, plan=plan, max_new_tokens=shape.max_new_tokens)
    tokens = jax.ShapeDtypeStruct((1, shape.bucket), jnp.int32)
    _, cache = jax.eval_shape(read, params, tokens, jax.ShapeDtypeStruct((1,), jnp.int32))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


def uncompressed_bytes(model: Transformer, dtype: Any, shape: Shape) -> int:
    """Bytes of one sequence's uncompressed caches."""
    params = {"embedding": jax.ShapeDtypeStruct((), jnp.dtype(dtype))}
    return full_cache_bytes(model, params, (1, shape.bucket), shape.max_new_tokens)


def gqa_bytes(model: Transformer, dtype: Any, shape: Shape) -> int | None:
    """`uncompressed_bytes` before any conversion; None for a model that never was GQA."""
    base = gqa_config(model.config)
    return None if base is None else uncompressed_bytes(Transformer(base), dtype, shape)


def gqa_config(config: ModelConfig) -> ModelConfig | None:
    """The model as it was before its attention was converted; None where it never was GQA.

    Conversions keep the attention they start from, or the config.json that described it.
    """
    base = config.with_attention(tuple(unconverted(layer.attention) for layer in config.layers))
    if not _is_gqa(base):
        raw = json.loads(config.hf_json)
        base = config_from_hf(raw) if raw else base
    return base if _is_gqa(base) else None


def kept_tokens(policy: Policy, config: ModelConfig, prompt_len: int, dtype: Any) -> Any:
    """[L][K] tokens that each head keeps of a prompt, its window included; None: everything.

    Of policies with a split these are the budgets that the heads of a layer share.
    """
    plan = policy.plan(config, prompt_len, jnp.dtype(dtype))
    return plan.kept(prompt_len).tolist() if isinstance(plan, CompressedPlan) else None


def kept_share(policy: Policy, config: ModelConfig, lengths: Sequence[int], dtype: Any) -> float:
    """Share of a prompt's tokens that a head keeps, the mean over heads and prompts."""
    buckets = {bucket_length(length) for length in lengths}
    plans = {bucket: policy.plan(config, bucket, jnp.dtype(dtype)) for bucket in buckets}
    shares = {}
    for length in set(lengths):
        plan = plans[bucket_length(length)]
        compresses = isinstance(plan, CompressedPlan)
        shares[length] = float(plan.kept(length).mean()) / length if compresses else 1.0
    return sum(shares[length] for length in lengths) / len(lengths)


def _is_gqa(config: ModelConfig) -> bool:
    return all(isinstance(layer.attention, GQAConfig) for layer in config.layers)
