"""Which implementation serves a call: that of the platform, or the one that was asked for."""

import functools
import importlib
from collections.abc import Callable
from typing import NamedTuple

import jax

from pallas_kernels import tuning

IMPLEMENTATIONS = ("auto", "xla", "pallas_tpu", "pallas_gpu")
MODULES = {"gqa_decode": "gqa", "ragged_gqa_decode": "ragged", "mla_decode": "mla"}
PLATFORMS = {"pallas_tpu": "tpu", "pallas_gpu": "gpu"}


class Target(NamedTuple):
    """What a trace is for.

    Attributes:
        platform: "cpu", "tpu" or "gpu".
        device_kind: as jax names it.
        alone: whether the program runs on one device, or each device's part is written by hand.
    """

    platform: str
    device_kind: str
    alone: bool


def target() -> Target:
    """The device of the mesh in context (`jax.sharding.use_abstract_mesh`), else the default one.

    A mesh without axes but with an abstract device is how one compiles for a device that is not
    there. The compiler cannot partition a kernel: it runs on one device, or under `jax.shard_map`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.axis_names:
        alone = mesh.are_all_axes_manual
    else:
        alone = mesh.abstract_device is not None or jax.device_count() == 1
    if mesh.abstract_device is None:
        device = jax.devices()[0]
        platform, kind = device.platform, device.device_kind
    else:
        platform, kind = mesh.abstract_device.platform, mesh.abstract_device.device_kind
    return Target("gpu" if platform in ("cuda", "rocm") else platform, kind, alone)


def choose(
    implementation: str, operation: str, target: Target, obstacles: dict[str, str | None]
) -> str:
    """The implementation's name.

    Args:
        obstacles: for each kernel why it cannot serve the arguments; None where it can.

    Raises:
        ValueError: no such implementation.
        NotImplementedError: it was asked for, and cannot serve.
    """
    if implementation not in IMPLEMENTATIONS:
        names = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"implementation {implementation!r} is none of {names}")
    if implementation == "auto":
        return next((name for name in PLATFORMS if _fits(name, target, obstacles)), "xla")
    if implementation == "xla":
        return implementation
    platform = PLATFORMS[implementation]
    reason = obstacles[implementation]
    if target.platform != platform:
        reason = f"it compiles for a {platform}, and this is a {target.platform}"
    if reason is not None:
        raise NotImplementedError(f"{operation} with {implementation}: {reason}")
    return implementation


def _fits(name: str, target: Target, obstacles: dict[str, str | None]) -> bool:
    return target.alone and PLATFORMS[name] == target.platform and obstacles[name] is None


def kernel(chosen: str, operation: str, target: Target) -> Callable | None:
    """The operation with its sizes for the device; None for "xla".

    Pallas is imported only by those who run it.
    """
    if chosen == "xla":
        return None
    platform = PLATFORMS[chosen]
    module = importlib.import_module(f"pallas_kernels.{platform}.{MODULES[operation]}")
    sizes = tuning.sizes(platform, operation, target.device_kind)
    return functools.partial(getattr(module, operation), **sizes)
