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

from kvjax.cache import ModelCache, PrefillCache
from kvjax.cache.prefill import start_prefill
from kvjax.cache.sharded import places, specs, with_shardings
from kvjax.mesh import AnyMesh, Layout
from kvjax.nn import Transformer
from kvjax.pipelines.plan_programs import located
from kvjax.policies.compression import Compression
from kvjax.policies.policy import Policy
from kvjax.prefill import Watching, observed_queries
from kvjax.prompts import bucket_length
from kvjax.sharding import param_shapes, param_shardings
from kvjax.topologies import device_bytes


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
            prompt: PrefillCache = start_prefill(
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
