"""The ways to cache that a plan compares, each as shapes with shardings on a mesh.

A `Variant` is a model with a cache policy. `Variant.served` says for how many sequences, and gives
the shapes of weights, prompts and caches: everything that programs are compiled from.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from kvjax.cache import ModelCache
from kvjax.cache.sharded import places, specs, with_shardings
from kvjax.capacity.devices import Topology, device_bytes
from kvjax.mesh import AnyMesh, Placement
from kvjax.nn import Transformer, param_shapes
from kvjax.policies.budgets import HeadImportance
from kvjax.policies.compression import Compression
from kvjax.policies.importance import HeadScores, default_scores
from kvjax.policies.named import parse_policy, resolve
from kvjax.policies.need import MeasuredNeed
from kvjax.policies.policy import Compress, Policy
from kvjax.prefilling import bucket_length, cache_shapes
from kvjax.sharding import param_shardings
from kvjax.transmla.layer import gqa_layers
from kvjax.transmla.sizes import components, decoupled_shape

LATENT = 512, 128


@dataclass(frozen=True)
class Workload:
    """What is served at the same time.

    Attributes:
        batch: sequences.
        context: prompt tokens per sequence.
        new_tokens: tokens per sequence that the caches have room for besides the prompt.
    """

    batch: int
    context: int
    new_tokens: int


@dataclass(frozen=True)
class Variant:
    """One way to cache: a model and the policy that compresses its prompts."""

    name: str
    model: Transformer
    policy: Policy

    def served(self, workload: Workload, mesh: Any, dtype: str) -> Served:
        """The shapes that this variant has under a workload."""
        return Served.create(self.model, self.policy, workload, mesh, dtype)


def variants(
    model: Transformer,
    policies: tuple[str, ...],
    latent: tuple[int, int] | None,
    notes: list[str],
) -> list[Variant]:
    """The full cache, 8-bit entries, each of the policies, and the converted model.

    Args:
        latent: widths of the converted model's latent and rotary key; None for `default_latent`,
            (0, 0) for no such variant.
        notes: remarks for the user are appended to this list.
    """
    found = [
        Variant("full", model, parse_policy("full")),
        Variant("int8", model, parse_policy("full:entries=int8")),
    ]
    for text in policies:
        policy = parse_policy(text)
        # The total budget does not depend on the scores, so equal scores can replace missing ones.
        scores = default_scores(model.config)
        if scores is None and lacks_scores(policy):
            heads = model.config.layers[0].attention.query_heads
            scores = HeadScores(np.ones((model.config.num_layers, heads, 1)))
            notes.append(f"{text}: no head scores, so all heads have the same budget.")
        found.append(Variant(text, model, resolve(policy, model.config, scores)))
    if latent is None:
        latent = default_latent(model, notes)
    if any(latent):
        rank, rope = latent
        converted = decoupled_shape(model, rank, rope)
        found.append(Variant(f"MLA {rank} + {rope}", converted, parse_policy("full")))
    return found


def default_latent(model: Transformer, notes: list[str]) -> tuple[int, int]:
    """512 + 128 numbers a token, as large models have after conversion (arXiv 2502.07864).

    Half of what keys and values have, where these have no more; (0, 0) for other than GQA layers.
    """
    try:
        width = min(components(base)[0] for base in gqa_layers(model))
    except ValueError as error:
        notes.append(f"No converted model is planned: {error}.")
        return 0, 0
    if width > sum(LATENT):
        return LATENT
    rope = width // 16 * 2
    return width // 2 - rope, rope


def lacks_scores(policy: Policy) -> bool:
    """Whether the policy needs head scores to share its budget and does not name any."""
    allocator = policy.allocator if isinstance(policy, Compress) else None
    return isinstance(allocator, HeadImportance) and allocator.scores is None


def shallower(variant: Variant, depth: int) -> Variant:
    """The variant with its first `depth` layers only, measurements of heads included."""
    config, policy = variant.model.config, variant.policy
    model = Transformer(dataclasses.replace(config, layers=config.layers[:depth]))
    if isinstance(policy, Compress) and isinstance(policy.allocator, HeadImportance | MeasuredNeed):
        policy = dataclasses.replace(policy, allocator=policy.allocator.of_layers(depth))
    return Variant(variant.name, model, policy)


@dataclass(frozen=True, eq=False)
class Served:
    """A model and a policy under a workload, as shapes.

    Attributes:
        model: the model.
        params: shapes of its parameters, each with its sharding.
        work: the policy applied to the prompts.
        mesh: all devices.
        dtype: of weights and activations.
    """

    model: Transformer
    params: Any
    work: Compression
    mesh: AnyMesh
    dtype: str

    @classmethod
    def create(
        cls, model: Transformer, policy: Policy, workload: Workload, mesh: AnyMesh, dtype: str
    ) -> Served:
        """A batch of prompts that all have `workload.context` tokens."""
        lengths, placement = (
            [workload.context] * workload.batch,
            Placement.create(mesh, workload.batch),
        )
        args = (model.config, lengths, workload.new_tokens, jnp.dtype(dtype), placement)
        work = policy.compression(*args)
        return cls(model, abstract_params(model, mesh, dtype), work, mesh, dtype)

    @property
    def placement(self) -> Placement:
        """How the batch is sharded over the mesh."""
        assert self.work.placement is not None
        return self.work.placement

    @property
    def prompt_shape(self) -> tuple[int, int]:
        """[B, T] of the padded prompts."""
        return len(self.work.lengths), bucket_length(int(self.work.lengths.max()))

    @functools.cached_property
    def cache(self) -> ModelCache:
        """Shapes of the caches after prefill, with shardings."""
        return located_cache(cache_shapes(self.work, self.prompt_shape[1]), self.placement)

    @property
    def nbytes(self) -> tuple[int, int]:
        """Bytes of one device: of the weights, and of the caches after prefill."""
        return device_bytes(self.params), device_bytes(self.cache)

    def rows(self, *axes: int, dtype: Any = np.int32) -> jax.ShapeDtypeStruct:
        """The shape [B, *axes] of an array with one row per sequence, sharded like the batch."""
        place = NamedSharding(self.placement.mesh, self.placement.spec("batch"))
        return jax.ShapeDtypeStruct((self.prompt_shape[0], *axes), np.dtype(dtype), sharding=place)


def located(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an array, with this sharding."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def located_cache(cache: ModelCache, placement: Placement) -> ModelCache:
    """The shapes of caches with the shardings that prefill gives to real caches."""

    def pool(shapes: Any) -> Any:
        return with_shardings(located, specs(shapes, placement), shapes, placement.mesh)

    def own(shapes: Any) -> Any:
        if shapes is None:
            return None
        # These caches name their shardings themselves: a dense cache may be sharded by slots.
        parts, placement = places(shapes)
        return with_shardings(located, parts, shapes, placement.mesh)

    rows = NamedSharding(placement.mesh, placement.spec("batch"))
    return dataclasses.replace(
        cache,
        own=tuple(map(own, cache.own)),
        pools=tuple(map(pool, cache.pools)),
        rope_lengths=located(cache.rope_lengths, rows),
    )


def abstract_params(model: Transformer, mesh: Any, dtype: Any) -> Any:
    """The shapes of the parameters in `dtype`, with their shardings on the mesh."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=place),
        param_shapes(model.config),
        param_shardings(model, mesh),
    )


def default_mesh(model: Transformer, topology: Topology, dtype: str) -> dict[str, int]:
    """The mesh that a plan takes by default, as axis sizes.

    Heads are sharded over as many devices as there are KV heads, or over more where the weights
    need more. The batch is sharded over the rest.
    """
    attention = model.config.layers[0].attention
    query_heads, base = attention.query_heads, attention.unconverted
    heads = query_heads if base.shared_latent else base.cached_heads
    # A tensor axis must divide the devices and the query heads, and must give every device whole
    # KV heads or give every KV head to a whole number of devices.
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
    """Remarks for the user where the tensor axis has more devices than there are KV heads.

    Args:
        sizes: devices along each axis of the mesh.
    """
    tensor = sizes.get("tensor", 1)
    each = [layer.attention for layer in model.config.layers]
    heads = {a.cached_heads for a in each if not a.shared_latent and not a.rebuilds_keys}
    return [
        f"tensor={tensor} is more than the {count} KV heads: {tensor // count} devices hold each, "
        f"so caches of heads take {tensor // count} times their bytes."
        for count in sorted(heads)
        if count < tensor
    ]
