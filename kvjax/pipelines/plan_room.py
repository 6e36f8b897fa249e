"""How many sequences, and how long ones, a device has room for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from kvjax.mesh import batch_axes, own_names
from kvjax.nn import Transformer
from kvjax.pipelines.plan_programs import Program
from kvjax.pipelines.plan_shapes import Served, Size
from kvjax.prefill import LONGEST_CHUNK
from kvjax.prompts import bucket_length

QUERY_TILE, KEY_TILE = 256, 512  # scores that exist at a time: see kvjax.cache.attention
LONGEST = 2**20  # tokens; contexts beyond are not told apart


@dataclass(frozen=True)
class Temporaries:
    """Bytes of one device: of a decode step, what one more sequence a group of devices adds to
    it, and of prefill of one sequence a group."""

    decode: float
    decode_more: float
    prefill: float


@dataclass(frozen=True)
class Room:
    """Bytes of one device as a function of what is served.

    Attributes:
        ways: devices that the batch is split over; batches are multiples of it.
        weights: bytes.
        fixed, per_token: bytes of the caches of `ways` sequences: fixed + per_token · context.
        decode, decode_more: bytes of a decode step's temporaries, and what `ways` more sequences
            add to them; most of it are copies of weights that don't depend on the batch.
        prefill: bytes that prefill takes besides caches, for each token of context; `ways`
            sequences are read at a time (`kvjax.prefill`), while the caches of all lie
            there already. Contexts are those of whole buckets (`bucket_length`).
    """

    ways: int
    weights: int
    fixed: float
    per_token: float
    decode: float = 0.0
    decode_more: float = 0.0
    prefill: float = 0.0

    @classmethod
    def measure(cls, serve: Callable[[Size], Served], size: Size, ways: int) -> Room:
        """Weights and caches; their bytes are linear in the context, at least from half of it on.

        Args:
            serve: a variant at work.
        """
        whole = bucket_length(size.context)
        half = bucket_length(whole // 2)

        def held(context: int) -> tuple[int, int]:
            return serve(dataclasses.replace(size, batch=ways, context=context)).nbytes

        (weights, less), (_, more) = held(half), held(whole)
        slope = (more - less) / max(whole - half, 1)
        return cls(ways, weights, more - slope * whole, slope)

    def with_temporaries(self, size: Size, temporaries: Temporaries) -> Room:
        """With the temporaries that programs for `size` have; prefill is of `ways` sequences."""
        groups = size.batch / self.ways
        return dataclasses.replace(
            self,
            decode=max(temporaries.decode - groups * temporaries.decode_more, 0.0),
            decode_more=temporaries.decode_more,
            prefill=temporaries.prefill / bucket_length(size.context),
        )

    def prefill_bytes(self, context: int) -> int:
        """What reading `ways` more sequences takes, their caches included."""
        return round(self.prefill * bucket_length(context)) + self.cache(self.ways, context)

    def cache(self, batch: int, context: int) -> int:
        """Bytes of the caches; a batch that the devices do not divide lies on all of them."""
        groups = batch // self.ways if batch % self.ways == 0 else batch
        return round(groups * (self.fixed + self.per_token * bucket_length(context)))

    def needed(self, batch: int, context: int) -> int:
        """Bytes of the larger of prefill and decode."""
        groups = batch // self.ways if batch % self.ways == 0 else batch
        decode = self.decode + groups * self.decode_more
        # A single group's caches are those of the batch.
        own = self.cache(self.ways, context) if groups == 1 else 0
        more = max(decode, self.prefill_bytes(context) - own)
        return round(self.weights + self.cache(batch, context) + more)

    def most_sequences(self, context: int, usable: int) -> int:
        """The largest batch of this context."""
        groups = 0
        step = 2**20
        while step:
            if self.needed((groups + step) * self.ways, context) <= usable:
                groups += step
            else:
                step //= 2
        return groups * self.ways

    def longest(self, batch: int, usable: int) -> int:
        """The longest context of this batch, up to LONGEST; prefill and decode both fit."""
        if self.needed(batch, LONGEST) <= usable:
            return LONGEST
        low, high = 0, LONGEST
        while high - low > 1:
            middle = (low + high) // 2
            if self.needed(batch, middle) <= usable:
                low = middle
            else:
                high = middle
        return low


def extrapolate(
    programs: Sequence[Program], depths: tuple[int, int], layers: int, name: str
) -> int:
    """Bytes of the program of all layers, by the line through those of two depths."""
    first, second = (getattr(program, name) for program in programs)
    slope = (second - first) / (depths[1] - depths[0])
    return round(max(first + slope * (layers - depths[0]), first, second))


def ways(mesh: Any) -> int:
    """Devices that batches are split over."""
    return math.prod(mesh.shape[axis] for axis in batch_axes(mesh))


def estimate(model: Transformer, size: Size, group: int, mesh: Any, dtype: Any) -> Temporaries:
    """The temporaries, by counting what exists at a time.

    The residual stream, the keys and values of two layers, a chunk's activations and a tile of
    scores; no more than a guide, within about a factor of two of what compilers need.
    """
    c, tensor = model.config, mesh.shape.get(own_names(mesh).get("tensor"), 1)
    rows, item = size.batch / group, jnp.dtype(dtype).itemsize
    layer = c.layers[0]
    base: Any = getattr(layer.attention, "base", layer.attention)
    heads = base.num_heads / tensor
    width = getattr(layer.mlp, "width", c.hidden_size) / tensor
    token = item * (4 * c.hidden_size + 3 * width) + 4 * heads * 2 * QUERY_TILE
    scores = 4 * heads * QUERY_TILE * KEY_TILE * 3
    kept = getattr(base, "num_kv_heads", 1) * getattr(base, "head_dim", 0) * 2
    kept = kept or base.kv_lora_rank + base.qk_rope_head_dim
    tokens = bucket_length(size.context)
    stream = item * tokens * c.hidden_size / tensor
    own = 2 * item * tokens * kept / tensor
    logits = 4 * c.vocab_size / tensor
    prefill = stream + own + LONGEST_CHUNK * token + scores + logits
    return Temporaries(rows * (token + logits), token + logits, prefill)
