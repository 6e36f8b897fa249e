"""Which implementation serves an operation, and with which block sizes.

The sizes of each device kind are in the JSON tables in tables/, which `python -m
pallas_kernels.bench --tune` measures and writes. A kind without an entry has the default's sizes.
"""

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
    """The device that a program is traced for.

    Attributes:
        platform: "cpu", "tpu" or "gpu".
        device_kind: jax's name of it, such as "TPU v5 lite".
        cores: multiprocessors of a GPU, cores of a TPU device; None if jax does not say.
        partitioned: why XLA may partition the program over several devices, which it cannot do to
            a kernel; None for one device, and under `jax.shard_map`.
    """

    platform: str
    device_kind: str
    cores: int | None
    partitioned: str | None


def target() -> Target:
    """The device of the mesh in context (`jax.sharding.use_abstract_mesh`), else the default one.

    To compile for a device that is not there, use a mesh without axes that has an abstract device.
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
    """See `Target`. A trace does not know the devices of its arrays, so all devices count."""
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
    """The operation's kernel with its sizes for the target; None if XLA serves.

    Args:
        implementation: "auto" or a name.
        operation: name of a public function.
        operands: the arguments of `limits.<operation>` behind `sizes`.

    Raises:
        ValueError: the implementation has an unknown name.
        NotImplementedError: the named implementation cannot serve.
    """
    return _function(operation, implementation, operation, operands)


def scheduler(implementation: str, *operands: Any) -> Callable | None:
    """The function that makes the work list of `ragged_gqa_decode`; otherwise like `kernel`."""
    return _function("ragged_work_list", implementation, "ragged_gqa_decode", operands)


def _function(
    function: str, implementation: str, operation: str, operands: tuple[Any, ...]
) -> Callable | None:
    """A function of the platform's module `operations`, with its sizes; see `kernel`."""
    check_name(implementation)
    on = target()
    if implementation == "xla" or (implementation == "auto" and on.platform not in LIMITS):
        return None
    # "auto" falls back to XLA, a name does not.
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
    # Imported here, so that a process without kernels does not load Pallas.
    module = importlib.import_module(f"pallas_kernels.{on.platform}.operations")
    return functools.partial(getattr(module, function), **_sizes(operation, on))


def check_name(implementation: str) -> None:
    """Raises ValueError for an unknown implementation."""
    if implementation not in IMPLEMENTATIONS:
        names = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"implementation {implementation!r} is none of {names}")


def _sizes(operation: str, on: Target) -> dict[str, int]:
    return sizes(on.platform, operation, on.device_kind, on.cores)


def _reason(operation: str, on: Target, operands: tuple[Any, ...]) -> str | None:
    """Why the target's kernel cannot serve; None if it can."""
    limit = getattr(LIMITS[on.platform], operation)
    return limit(on.device_kind, _sizes(operation, on), *operands)


_WARNED: set[tuple[str, str]] = set()


def _warn(operation: str, reason: str) -> None:
    """Warns once for each operation and reason; reasons that differ in numbers only are one."""
    kind = operation, re.sub(r"\d+", "", reason)
    if kind in _WARNED:
        return
    _WARNED.add(kind)
    warnings.warn(
        f"{operation} runs without its kernel, and slower: {reason} "
        '(pass implementation="xla" to do so without this warning)',
        RuntimeWarning,
        stacklevel=5,  # the caller of the public function
    )


# A part of jit's cache key: a function is traced again if the sizes differ.
_CHOSEN = jax.make_user_context(default_value=())


@contextmanager
def using(**sizes: int) -> Iterator[None]:
    """Traces in this context take these sizes instead of the tables', in tests and measurements."""
    with _CHOSEN(tuple(sorted(sizes.items()))):
        yield


def sizes(
    platform: str, operation: str, device_kind: str, cores: int | None = None
) -> dict[str, int]:
    """The sizes that the operation's kernel takes as arguments.

    Args:
        platform: "tpu" or "gpu".
        operation: name of a public function.
        device_kind: jax's name of the device, such as "TPU v5 lite".
        cores: multiprocessors of a GPU, whose kernel has a share for each. The table's number is
            for devices that do not say.
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
