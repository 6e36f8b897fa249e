"""Which implementation serves, the platform's kernel or XLA, and with which block sizes."""

import functools
import importlib
import json
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from typing import Any, NamedTuple

import jax

from pallas_kernels.gpu import limits as gpu_limits
from pallas_kernels.tpu import limits as tpu_limits

IMPLEMENTATIONS = ("auto", "xla", "pallas_tpu", "pallas_gpu")
PLATFORMS = {"pallas_tpu": "tpu", "pallas_gpu": "gpu"}
LIMITS: dict[str, Any] = {"tpu": tpu_limits, "gpu": gpu_limits}


class Target(NamedTuple):
    """What a trace is for.

    Attributes:
        platform: "cpu", "tpu" or "gpu".
        device_kind: as jax names it.
        cores: of a device: multiprocessors of a GPU, cores of a TPU; None where jax does not say.
        partitioned: why XLA may cut the program into parts for several devices, which it cannot do
            to a kernel; None where the program runs on one device, or is under `jax.shard_map`.
    """

    platform: str
    device_kind: str
    cores: int | None
    partitioned: str | None


def target() -> Target:
    """The device of the mesh in context (`jax.sharding.use_abstract_mesh`), else the default one.

    A mesh without axes but with an abstract device is how one compiles for a device that is not
    there.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.abstract_device is None:
        device = jax.devices()[0]
        platform, kind = device.platform, device.device_kind
        cores = getattr(device, "core_count", None)
    else:
        device = mesh.abstract_device
        platform, kind, cores = device.platform, device.device_kind, device.num_cores
    platform = "gpu" if platform in ("cuda", "rocm") else platform
    return Target(platform, kind, cores, _partitioned(mesh))


def _partitioned(mesh: jax.sharding.AbstractMesh) -> str | None:
    """See `Target`. Which devices hold a traced array is unknown, so all there are count."""
    if mesh.axis_names:
        if mesh.are_all_axes_manual:
            return None
        axes = ", ".join(map(str, mesh.axis_names))
        return f"XLA partitions the program over the mesh axes {axes}: call it under jax.shard_map"
    if mesh.abstract_device is not None or jax.device_count() == 1:
        return None
    return (
        f"there are {jax.device_count()} devices, and XLA may partition the program over them: put "
        "the parameters on a mesh, kvjax.load(…, mesh=…), or call it under jax.shard_map"
    )


def kernel(implementation: str, operation: str, *operands: Any) -> Callable | None:
    """The operation's kernel with its sizes for the device; None for XLA.

    Args:
        operands: what the platforms' `limits.<operation>` take.

    Raises:
        ValueError: no such implementation.
        NotImplementedError: it was asked for by name, and cannot serve.
    """
    return _function(operation, implementation, operation, operands)


def scheduler(implementation: str, *operands: Any) -> Callable | None:
    """What makes the work list of `ragged_gqa_decode`, with the kernel's sizes; as `kernel`."""
    return _function("ragged_work_list", implementation, "ragged_gqa_decode", operands)


def _function(
    function: str, implementation: str, operation: str, operands: tuple[Any, ...]
) -> Callable | None:
    """A function of the platform's `operations`; see `kernel`.

    Pallas is imported only by those who run it. Where "auto" leaves an operation to XLA on a
    platform that has kernels, a warning says why, once a process.
    """
    check_name(implementation)
    on = target()
    if implementation == "xla" or (implementation == "auto" and on.platform not in LIMITS):
        return None
    if implementation == "auto":
        reason = _reason(operation, on, operands) or on.partitioned
        if reason is not None:
            _warn(operation, reason)
            return None
    else:
        platform = PLATFORMS[implementation]
        reason = f"it compiles for a {platform}, and this is a {on.platform}"
        if on.platform == platform:
            reason = _reason(operation, on, operands)
        if reason is not None:
            raise NotImplementedError(f"{operation} with {implementation}: {reason}")
    module = importlib.import_module(f"pallas_kernels.{on.platform}.operations")
    return functools.partial(getattr(module, function), **_sizes(operation, on))


def check_name(implementation: str) -> None:
    """Raises ValueError where there is no such implementation."""
    if implementation not in IMPLEMENTATIONS:
        names = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"implementation {implementation!r} is none of {names}")


def _sizes(operation: str, on: Target) -> dict[str, int]:
    return sizes(on.platform, operation, on.device_kind, on.cores)


def _reason(operation: str, on: Target, operands: tuple[Any, ...]) -> str | None:
    """Why the platform's kernel cannot serve; None where it can."""
    limit = getattr(LIMITS[on.platform], operation)
    return limit(on.device_kind, _sizes(operation, on), *operands)


_WARNED: set[tuple[str, str]] = set()


def _warn(operation: str, reason: str) -> None:
    """Once for an operation and a kind of reason: other numbers are no other reason."""
    kind = operation, re.sub(r"\d+", "", reason)
    if kind in _WARNED:
        return
    _WARNED.add(kind)
    warnings.warn(
        f"{operation} runs without its kernel, slower: {reason} "
        '(implementation="xla" asks for this, and is not warned of)',
        RuntimeWarning,
        stacklevel=5,
    )


# Part of jit's cache key, so that a function traced with other sizes is traced again.
_CHOSEN = jax.make_user_context(default_value=())


@contextmanager
def using(**sizes: int) -> Iterator[None]:
    """Traces take these sizes instead of the tables': for measurements and tests."""
    with _CHOSEN(tuple(sorted(sizes.items()))):
        yield


def sizes(
    platform: str, operation: str, device_kind: str, cores: int | None = None
) -> dict[str, int]:
    """The sizes that the operation's kernel takes as arguments.

    Args:
        platform: "tpu" or "gpu", the table.
        operation: a public function's name.
        device_kind: as jax names it, such as "TPU v5 lite".
        cores: of the device. A GPU's kernel has a share for each; the table's number is for
            devices that don't tell.
    """
    tables = table(platform)
    found = tables["default"][operation]
    if platform == "gpu" and cores is not None and cores > 1:
        found = found | {"shares": cores}
    found = found | tables.get(device_kind, {}).get(operation, {})
    return found | {name: size for name, size in _CHOSEN.value if name in found}


@functools.cache
def table(platform: str) -> dict[str, Any]:
    """{device kind: {operation: {size: number}}}; the kind "default" is complete."""
    return json.loads((files("pallas_kernels") / "tables" / f"{platform}.json").read_text())
