"""The ways to cache that a plan compares, and the mesh that it takes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvjax.nn import Transformer
from kvjax.pipelines.plan_shapes import Served, Size, abstract_params
from kvjax.policies.budgets import HeadImportance
from kvjax.policies.importance import HeadScores, default_scores
from kvjax.policies.named import parse_policy, resolve
from kvjax.policies.policy import Compress, Policy
from kvjax.topologies import Topology, device_bytes
from kvjax.transmla.sizes import decoupled_shape


@dataclass(frozen=True)
class Variant:
    """One way to cache: a model and what stays of its prompts."""

    name: str
    model: Transformer
    policy: Policy

    def served(self, size: Size, mesh: Any, dtype: str) -> Served:
        """It at work."""
        return Served.create(self.model, self.policy, size, mesh, dtype)


def variants(
    model: Transformer,
    policies: tuple[str, ...],
    latent: tuple[int, int] | None,
    notes: list[str],
) -> list[Variant]:
    """Full cache, 8-bit entries, the policies, and the converted model.

    Args:
        latent: widths of the converted model's latent and rotary key; None for none.
        notes: gets what is to be said of them.
    """
    found = [
        Variant("full", model, parse_policy("full")),
        Variant("int8", model, parse_policy("full:entries=int8")),
    ]
    for text in policies:
        policy = parse_policy(text)
        scores = default_scores(model.config)
        if scores is None and lacks_scores(policy):
            heads = model.config.layers[0].attention.query_heads
            scores = HeadScores(np.ones((model.config.num_layers, heads, 1)))
            notes.append(f"{text}: no head scores, so all heads have the same budget.")
        found.append(Variant(text, model, resolve(policy, model.config, scores)))
    if latent is not None:
        rank, rope = latent
        converted = decoupled_shape(model, rank, rope)
        found.append(Variant(f"MLA {rank} + {rope}", converted, parse_policy("full")))
    return found


def lacks_scores(policy: Policy) -> bool:
    """Whether budgets go by head scores that the policy does not name."""
    allocator = policy.allocator if isinstance(policy, Compress) else None
    return isinstance(allocator, HeadImportance) and allocator.scores is None


def shallower(variant: Variant, depth: int) -> Variant:
    """The variant with the first layers only; head scores too."""
    config, policy = variant.model.config, variant.policy
    model = Transformer(dataclasses.replace(config, layers=config.layers[:depth]))
    if isinstance(policy, Compress) and isinstance(policy.allocator, HeadImportance):
        assert policy.allocator.scores is not None
        scores = HeadScores(policy.allocator.scores.samples[:depth])
        allocator = dataclasses.replace(policy.allocator, scores=scores)
        policy = dataclasses.replace(policy, allocator=allocator)
    return Variant(variant.name, model, policy)


def default_mesh(model: Transformer, topology: Topology, dtype: str) -> dict[str, int]:
    """Heads over as many devices as there are KV heads, or more where the weights need it; the
    batch over the rest."""
    attention = model.config.layers[0].attention
    query_heads, base = attention.query_heads, attention.unconverted
    heads = query_heads if base.shared_latent else base.cached_heads
    ways = [n for n in range(1, topology.count + 1) if topology.count % n == query_heads % n == 0]
    fits = [n for n in ways if heads % n == 0 or n % heads == 0]
    tensor = max(n for n in fits if n <= heads)

    def too_large(tensor: int) -> bool:
        shape = topology.abstract_mesh({"data": topology.count // tensor, "tensor": tensor})
        return device_bytes(abstract_params(model, shape, dtype)) > 0.8 * topology.usable

    while too_large(tensor) and tensor < max(fits):
        tensor = min(n for n in fits if n > tensor)
    return {"data": topology.count // tensor, "tensor": tensor}


def head_notes(model: Transformer, sizes: dict[str, int]) -> list[str]:
    """Where there are more devices along the tensor axis than KV heads."""
    tensor = sizes.get("tensor", 1)
    each = [layer.attention for layer in model.config.layers]
    heads = {a.cached_heads for a in each if not a.shared_latent and not a.rebuilds_keys}
    return [
        f"tensor={tensor} is more than the {count} KV heads: {tensor // count} devices hold each, "
        f"so caches of heads take {tensor // count} times their bytes."
        for count in sorted(heads)
        if count < tensor
    ]
