"""The identity of a model: its configuration, its dtype and checksums of all its weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from kvjax.config import ModelConfig
from kvjax.mesh import automatic_axes, on_automatic_mesh

SHOWN = 4  # number of changed parameters that a message names


@dataclass(frozen=True)
class Identity:
    """Two models with equal identities give the same answers.

    Attributes:
        config: digest of the configuration, after the model type: "llama-0f3a6c1e22b4".
        dtype: dtype of the weights, and so of activations and cache.
        weights: checksum of each top-level entry of the parameters ("layers_3"), by name.
    """

    config: str
    dtype: str
    weights: Mapping[str, str]

    @property
    def digest(self) -> str:
        """One digest of configuration, dtype and weights, 12 hexadecimal digits."""
        content = [self.config, self.dtype, sorted(self.weights.items())]
        return _sha256(json.dumps(content).encode())

    def differences(self, other: Identity) -> str:
        """Describes what differs in `other`; empty if nothing does.

        With another dtype all checksums differ, so the description then omits the weights.
        """
        found = []
        if other.config != self.config:
            found.append(f"configuration {other.config}, expected {self.config}")
        if other.dtype != self.dtype:
            found.append(f"dtype {other.dtype}, expected {self.dtype}")
        elif other.config == self.config:
            names = sorted(
                name
                for name in {*self.weights, *other.weights}
                if self.weights.get(name) != other.weights.get(name)
            )
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            if names:
                found.append(f"other weights in {', '.join(names[:SHOWN])}{more}")
        return "; ".join(found)


@automatic_axes()
def identity(config: ModelConfig, params: Mapping[str, Any]) -> Identity:
    """Computes the identity; reads every weight once, on its device.

    Args:
        params: nested parameters. Parameters that are read layer by layer are freed again.

    Returns:
        The identity, which is the same on one device, on a mesh and on every platform.
    """
    # Where a model was loaded from does not change its answers.
    own = dataclasses.replace(config, source="", hf_json="{}")
    weights, dtype = {}, ""
    for name in params:
        part = on_automatic_mesh(params[name])
        weights[name] = part_checksum(part)
        if name == "embedding":
            dtype = jnp.dtype(part.dtype).name
        del part  # free it before the next one is read
    return Identity(f"{config.model_type}-{_sha256(repr(own).encode())}", dtype, weights)


def part_checksum(part: Any) -> str:
    """A digest of 12 hexadecimal digits, from the checksum of each array of a nested dict."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(part)
    # Start all checksums before the first is read: int() waits for the device.
    sums = [(path, leaf, checksum(leaf)) for path, leaf in leaves]
    lines = [
        f"{jax.tree_util.keystr(path)} {jnp.dtype(leaf.dtype).name} {leaf.shape} {int(total):08x}"
        for path, leaf, total in sums
    ]
    return _sha256("\n".join(lines).encode())


@jax.jit
def checksum(x: Array) -> UInt32[Array, ""]:
    """The sum over all elements of a hash of their bits and their index.

    Integer sums modulo 2³² do not depend on the order, so neither the platform nor a mesh matters.
    For a fixed index the hash is a bijection, so a change of one element always changes the sum.
    Several changes, such as a flipped sign of all elements, cancel with probability 2⁻³². The hash
    is "lowbias32" of Chris Wellons' hash-prospector.
    """
    bits = jax.lax.bitcast_convert_type(x, _UNSIGNED[min(x.dtype.itemsize, 4)])
    # The flat index of each element, modulo 2³².
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        place = place * jnp.uint32(size & 0xFFFFFFFF) + index
    # Mix bits and index; then the rounds of lowbias32.
    mixed = bits.astype(jnp.uint32) ^ (place * jnp.uint32(0x9E3779B1))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        mixed = (mixed ^ (mixed >> jnp.uint32(shift))) * jnp.uint32(factor)
    return jnp.sum(mixed ^ (mixed >> jnp.uint32(16)), dtype=jnp.uint32)


_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def array_digest(values: np.ndarray) -> str:
    """Digest of a host array's dtype, shape and bytes, 12 hexadecimal digits."""
    head = f"{values.dtype.str}{values.shape}".encode()
    return _sha256(head + np.ascontiguousarray(values).tobytes())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
