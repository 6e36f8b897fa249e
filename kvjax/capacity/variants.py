"""Parameters, prompts and caches as shapes, each where it lies on a mesh."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from kvjax.cache import ModelCache, PromptCache
from kvjax.cache.sharded import places, specs, with_shardings
from kvjax.capacity.devices import Topology, device_bytes
from kvjax.headkv.allocators import HeadImportance
from kvjax.headkv.compression import Compression
from kvjax.headkv.facts import start_prompt, unconverted
from kvjax.headkv.policy import Compress, Policy, resolve
from kvjax.headkv.scores import HeadScores, attention_heads, default_scores
from kvjax.mesh import AnyMesh, Layout
from kvjax.nn import Transformer
from kvjax.prefill import Watching, observed_queries
from kvjax.prompts import bucket_length
from kvjax.sharding import param_shapes, param_shardings
from kvjax.transmla.shape import decoupled_shape


@dataclass(frozen=True)
class Size:
    """What is served at a time: sequences, prompt tokens and new tokens of each."""

    batch: int
    context: int
    new_tokens: int


@dataclass(frozen=True, eq=False)
class Served:
    """A model and a policy at work on a mesh.

    Attributes:
        model, params: the parameters as shapes, each where it lies.
        work: the policy on the prompts.
        mesh: of all devices.
        dtype: of weights and activations.
    """

    model: Transformer
    params: Any
    work: Compression
    mesh: AnyMesh
    dtype: str

    @classmethod
    def create(
        cls, model: Transformer, policy: Policy, size: Size, mesh: AnyMesh, dtype: str
    ) -> Served:
        """Prompts of the same length."""
        lengths, layout = [size.context] * size.batch, Layout.create(mesh, size.batch)
        args = (model.config, lengths, size.new_tokens, jnp.dtype(dtype), layout)
        work = policy.compression(*args)
        return cls(model, abstract_params(model, mesh, dtype), work, mesh, dtype)

    @property
    def layout(self) -> Layout:
        """Of the batch."""
        assert self.work.layout is not None
        return self.work.layout

    @property
    def prompt_shape(self) -> tuple[int, int]:
        """[B, T] of the padded prompts."""
        return len(self.work.lengths), bucket_length(int(self.work.lengths.max()))

    @functools.cached_property
    def cache(self) -> ModelCache:
        """The caches after prefill."""
        return located_cache(jax.eval_shape(self._prefilled), self.layout)

    @property
    def nbytes(self) -> tuple[int, int]:
        """Bytes of a device: weights, and caches after prefill."""
        return device_bytes(self.params), device_bytes(self.cache)

    def rows(self, *axes: int, dtype: Any = np.int32) -> jax.ShapeDtypeStruct:
        """An array whose first axis is the batch."""
        place = NamedSharding(self.layout.mesh, self.layout.spec("batch"))
        return jax.ShapeDtypeStruct((self.prompt_shape[0], *axes), np.dtype(dtype), sharding=place)

    def _prefilled(self) -> ModelCache:
        caches, observed = self.work.start(), observed_queries([self.work])
        for layer, kind in enumerate(self.model.config.layers):
            watching = Watching.of([self.work], layer)
            prompt: PromptCache = start_prompt(
                kind.attention,
                *self.prompt_shape,
                observed,
                jnp.dtype(self.dtype),
                watching.observers,
                self.mesh,
            )
            caches = self.work.compress(caches, layer, prompt.seen_by(watching.wanted[0]))
        return caches


def abstract_params(model: Transformer, mesh: Any, dtype: Any) -> Any:
    """The parameters' shapes."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=place),
        param_shapes(model),
        param_shardings(model, mesh),
    )


def located(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    """The leaf's shape, where it lies."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def located_cache(cache: ModelCache, layout: Layout) -> ModelCache:
    """The shapes of caches with the shardings that the caches themselves name."""

    def pool(shapes: Any) -> Any:
        return with_shardings(located, specs(shapes, layout), shapes, layout.mesh)

    def own(shapes: Any) -> Any:
        if shapes is None:
            return None
        parts, layout = places(shapes)
        return with_shardings(located, parts, shapes, layout.mesh)

    rows = NamedSharding(layout.mesh, layout.spec("batch"))
    return dataclasses.replace(
        cache,
        own=tuple(map(own, cache.own)),
        pools=tuple(map(pool, cache.pools)),
        rope_lengths=located(cache.rope_lengths, rows),
    )


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
        Variant("full", model, Policy.parse("full")),
        Variant("int8", model, Policy.parse("full:entries=int8")),
    ]
    for text in policies:
        policy = Policy.parse(text)
        scores = default_scores(model.config)
        if scores is None and lacks_scores(policy):
            heads, _ = attention_heads(model.config.layers[0].attention)
            scores = HeadScores(np.ones((model.config.num_layers, heads, 1)))
            notes.append(f"{text}: no head scores, so all heads have the same budget.")
        found.append(Variant(text, model, resolve(policy, model.config, scores)))
    if latent is not None:
        rank, rope = latent
        converted = decoupled_shape(model, rank, rope)
        found.append(Variant(f"MLA {rank} + {rope}", converted, Policy.parse("full")))
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
    query_heads, _ = attention_heads(attention)
    heads = getattr(unconverted(attention), "num_kv_heads", query_heads)
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
    heads = {getattr(layer.attention, "num_kv_heads", tensor) for layer in model.config.layers}
    return [
        f"tensor={tensor} is more than the {count} KV heads: {tensor // count} devices hold each, "
        f"so caches of heads take {tensor // count} times their bytes."
        for count in sorted(heads)
        if count < tensor
    ]
