"""Reorders heads so that each device of a mesh holds about the same number of cache bytes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache.sharded import head_copies
from kvjax.config import GQAConfig, of_kind
from kvjax.mesh import Placement, mesh_of
from kvjax.nn import Transformer
from kvjax.nn.params import layer_params
from kvjax.policies.budgets import Allocator, Request
from kvjax.policies.named import resolve_each
from kvjax.policies.policy import Compress, Policy
from pallas_kernels.entries import assign_heads

Orders = tuple[tuple[int, ...], ...]
"""For every layer the old numbers of the KV heads, in their new order."""


@dataclass(frozen=True)
class Reordered:
    """The budgets of another allocator, with the heads reordered."""

    allocator: Allocator
    orders: Orders

    def __call__(self, request: Request) -> np.ndarray:
        return np.take_along_axis(np.asarray(self.allocator(request)), np.asarray(self.orders), 1)


def balance(
    model: Transformer, params: Any, policy: str | Policy, prompt_len: int
) -> tuple[Any, Policy]:
    """Reorders the KV heads of the parameters so that the devices' caches balance.

    A device holds consecutive heads. HeadKV's budgets differ between heads, so the device with the
    largest budgets would limit the batch. This function assigns heads to devices by their bytes
    (see `pallas_kernels.entries.assign_heads`). The order of heads within a layer is arbitrary:
    the model computes the same function, up to the order of sums.

    Examples:
        >>> policy = "headkv:kv_size=24"
        >>> params, policy = kvjax.headkv.balance(model, params, policy, prompt_len=1024)
        >>> out = kvjax.generate(model, params, prompts, max_new_tokens=4, policy=policy)

    Args:
        params: parameters on a mesh; without a tensor axis they are returned unchanged.
        prompt_len: length of the prompts that the budgets are for.

    Returns:
        The parameters, on the same devices, and the policy for the new order. Both are unchanged if
        all heads have the same budget.

    Raises:
        ValueError: the policy cannot be resolved, or the number of heads and devices do not fit.
    """
    (policy,) = resolve_each([policy], model.config)
    mesh = mesh_of(params)
    if mesh is None or not isinstance(policy, Compress):
        return params, policy
    ways = Placement.create(mesh, 1).ways
    if ways == 1 or any(layer.attention.no_head_budget for layer in model.config.layers):
        return params, policy
    # Devices that hold copies of one head need the same heads: they form one group.
    groups = ways // head_copies(model.config.budget_heads, ways)
    caps, recent = policy.caps(model.config, prompt_len, params["embedding"].dtype)
    orders = assign_heads(caps + recent, groups)
    if (np.diff(caps, axis=1) == 0).all():
        return params, policy
    nested = tuple(tuple(int(head) for head in order) for order in orders)
    moved = dataclasses.replace(policy, allocator=Reordered(policy.allocator, nested))
    return reorder_heads(model, params, nested), moved


def reorder_heads(model: Transformer, params: Any, orders: Orders) -> dict[str, Any]:
    """The parameters of the same function, with KV heads and their query heads reordered."""
    moved = dict(params)
    for index, (layer, order) in enumerate(zip(model.config.layers, orders, strict=True)):
        name, base = f"layers_{index}", of_kind(layer.attention.unconverted, GQAConfig)
        # The query heads of a group move with their KV head.
        groups = np.arange(base.num_heads).reshape(base.num_kv_heads, -1)
        rows = {"kv": np.asarray(order), "heads": groups[np.asarray(order)].reshape(-1)}
        table = layer_params(model.config, layer)["attn"]
        attn = {
            leaf: _reorder(value, table[leaf].axes, rows)
            for leaf, value in params[name]["attn"].items()
        }
        # A norm over all heads has one weight per component, without an axis of heads.
        if base.qk_norm == "all":
            for leaf, kind in (("q_norm", "heads"), ("k_norm", "kv")):
                attn[leaf] = _reorder_norm(attn[leaf], rows[kind])
        moved[name] = {**params[name], "attn": attn}
    return moved


def _reorder(value: jax.Array, names: tuple[str | None, ...], rows: dict[str, Any]) -> jax.Array:
    """A parameter with its axes of heads reordered, on the same devices."""
    for axis, name in enumerate(names):
        # The axis of the heads within a group also has this name, and must stay.
        if name in rows and value.shape[axis] == len(rows[name]):
            value = _take(value, rows[name], axis)
    return value


def _reorder_norm(weight: jax.Array, heads: np.ndarray) -> jax.Array:
    """Reorders the weight of a norm over all heads."""
    width = weight.shape[0] // len(heads)
    index = (heads[:, None] * width + np.arange(width)).reshape(-1)
    return _take(weight, index, 0)


def _take(value: jax.Array, index: np.ndarray, axis: int) -> jax.Array:
    # jax shares the programs of all wrappers of one function; a lambda would compile every time.
    taken = jax.jit(_taken, static_argnums=2, out_shardings=value.sharding)
    return taken(value, index, axis)


def _taken(x: jax.Array, index: jax.Array, axis: int) -> jax.Array:
    return jnp.take(x, index, axis=axis)
