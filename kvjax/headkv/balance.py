"""Heads in an order in which the devices of a mesh hold as many bytes each."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache.sharded import head_copies
from kvjax.config import GQAConfig, of_kind
from kvjax.mesh import Layout, mesh_of
from kvjax.nn import Transformer
from kvjax.policies.budgets import Allocator, Request
from kvjax.policies.importance import default_scores
from kvjax.policies.named import resolve
from kvjax.policies.policy import Compress, Policy
from kvjax.sharding import logical_axes
from pallas_kernels.segments import assign_heads

Orders = tuple[tuple[int, ...], ...]
"""For every layer the old number of each KV head, in the new order."""


@dataclass(frozen=True)
class Reordered:
    """The budgets of another allocator, for heads in another order."""

    allocator: Allocator
    orders: Orders

    def __call__(self, request: Request) -> np.ndarray:
        return np.take_along_axis(np.asarray(self.allocator(request)), np.asarray(self.orders), 1)


def balance(
    model: Transformer, params: Any, policy: str | Policy, prompt_len: int
) -> tuple[Any, Policy]:
    """Parameters with KV heads reordered, and the policy for them, so that caches balance.

    Consecutive heads lie on one device. HeadKV's budgets differ between heads, so the device with
    the greediest heads would decide what fits; here heads go to devices by their bytes (see
    `pallas_kernels.segments.assign_heads`). The order of heads within a layer is arbitrary: the
    model computes what it did, up to the order of sums.

    Args:
        params: on a mesh; without a tensor axis nothing is to be done.
        prompt_len: of the prompts that the budgets are for.

    Returns:
        The parameters, where they lay before, and the policy; both as they are where budgets are
        the same for all heads.

    Raises:
        ValueError: the policy cannot be resolved, or heads and devices do not fit.
    """
    policy = resolve(policy, model.config, default_scores(model.config))
    mesh = mesh_of(params)
    if mesh is None or not isinstance(policy, Compress):
        return params, policy
    ways = Layout.create(mesh, 1).ways
    if ways == 1 or any(layer.attention.no_head_budget for layer in model.config.layers):
        return params, policy
    groups = ways // head_copies(model.config.budget_heads, ways)
    caps, window = policy.caps(model.config, prompt_len, params["embedding"].dtype)
    orders = assign_heads(caps + window, groups)
    if (np.diff(caps, axis=1) == 0).all():
        return params, policy
    nested = tuple(tuple(int(head) for head in order) for order in orders)
    moved = dataclasses.replace(policy, allocator=Reordered(policy.allocator, nested))
    return reorder_heads(model, params, nested), moved


def reorder_heads(model: Transformer, params: Any, orders: Orders) -> dict[str, Any]:
    """The same function with the KV heads of every layer, and their query heads, reordered."""
    axes, moved = logical_axes(model), dict(params)
    for index, (layer, order) in enumerate(zip(model.config.layers, orders, strict=True)):
        name, base = f"layers_{index}", of_kind(layer.attention.unconverted, GQAConfig)
        groups = np.arange(base.num_heads).reshape(base.num_kv_heads, -1)
        rows = {"kv": np.asarray(order), "heads": groups[np.asarray(order)].reshape(-1)}
        attn = {
            leaf: _reorder(value, axes[name]["attn"][leaf], rows)
            for leaf, value in params[name]["attn"].items()
        }
        if base.qk_norm == "all":
            for leaf, kind in (("q_norm", "heads"), ("k_norm", "kv")):
                attn[leaf] = _reorder_norm(attn[leaf], rows[kind])
        moved[name] = {**params[name], "attn": attn}
    return moved


def _reorder(value: jax.Array, names: tuple[str | None, ...], rows: dict[str, Any]) -> jax.Array:
    """A parameter with its axes of heads reordered, where it lies."""
    for axis, name in enumerate(names):
        # The axis of the heads within a group has the name too.
        if name in rows and value.shape[axis] == len(rows[name]):
            value = _take(value, rows[name], axis)
    return value


def _reorder_norm(weight: jax.Array, heads: np.ndarray) -> jax.Array:
    """A norm's weight over all heads."""
    width = weight.shape[0] // len(heads)
    index = (heads[:, None] * width + np.arange(width)).reshape(-1)
    return _take(weight, index, 0)


def _take(value: jax.Array, index: np.ndarray, axis: int) -> jax.Array:
    taken = jax.jit(lambda x: jnp.take(x, index, axis=axis), out_shardings=value.sharding)
    return taken(value)
