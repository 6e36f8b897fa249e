"""Devices of another machine: how much memory each kind has, and devices that can only compile.

jax compiles for a topology without its devices: for TPUs with libtpu, for GPUs with its CUDA plugin
and a description of the GPU in XLA's words.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from kvjax.mesh import MESH_AXES


@dataclass(frozen=True)
class Kind:
    """A kind of device.

    Attributes:
        device_kind: jax's name for the kind.
        platform: "tpu" or "gpu".
        memory: bytes of one device.
    """

    device_kind: str
    platform: str
    memory: int


MIB, GIB = 2**20, 2**30
KINDS = {
    # cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}: HBM per chip; a chip is one jax device.
    "v4": Kind("TPU v4", "tpu", 32 * GIB),
    "v5e": Kind("TPU v5 lite", "tpu", 16 * GIB),
    "v5p": Kind("TPU v5", "tpu", 95 * GIB),
    "v6e": Kind("TPU v6 lite", "tpu", 32 * GIB),
    # nvidia-smi's totals; the data sheets' 80 and 141 GB are GiB.
    "h100": Kind("NVIDIA H100 80GB HBM3", "gpu", 81_559 * MIB),
    "h200": Kind("NVIDIA H200", "gpu", 143_771 * MIB),
}
RESERVED = 0.03
"""Share of a device's memory that programs cannot use. The runtime keeps some (XLA offers 15.75 of
a v5e's 16 GiB), and fragmentation costs some."""

# NVIDIA's data sheets, SXM: bytes per second.
BANDWIDTHS = {
    "NVIDIA H100 80GB HBM3": 3_350_000_000_000,
    "NVIDIA H200": 4_800_000_000_000,
}
GPUS_PER_HOST = 8

# NVIDIA's H100 tensor core GPU architecture white paper and CUDA's compute capability 9.0.
HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: {bandwidth}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 minor: 0 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 1 }}
runtime_version {{ major: 13 minor: 0 }}
device_description_str: "{device_kind}"
"""


@dataclass(frozen=True)
class Topology:
    """A number of devices of one kind, such as "v5e:4x4" or "h200:8".

    Attributes:
        name: the text that named the topology.
        kind: of every device.
        count: number of devices.
    """

    name: str
    kind: Kind
    count: int

    @classmethod
    def parse(cls, name: str) -> Topology:
        """Reads a topology from its name: a kind, a colon, and a shape or a number of devices.

        Raises:
            ValueError: another form, or a kind that is not in `KINDS`.
        """
        found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
        if found is None or found[1] not in KINDS:
            raise ValueError(
                f"got topology {name!r}, expected KIND:SHAPE like v5e:4x4 or h200:8 with one of "
                f"{', '.join(KINDS)}"
            )
        return cls(name, KINDS[found[1]], math.prod(map(int, found[2].split("x"))))

    @property
    def usable(self) -> int:
        """Bytes of one device that programs can use."""
        return int(self.kind.memory * (1 - RESERVED))

    @property
    def notes(self) -> tuple[str, ...]:
        """The settings of jax that make `usable` bytes available."""
        if self.kind.platform == "tpu":
            return ()
        needed = f"XLA_PYTHON_CLIENT_MEM_FRACTION={1 - RESERVED:g}"
        return (f"jax takes 75 % of a GPU's memory by itself: this needs {needed}.",)

    def devices(self) -> list[Any]:
        """Devices that jax can compile for. They cannot run a program.

        Raises:
            ValueError: no compiler for these devices is installed, or the compiler does not know
                the topology.
        """
        if self.kind.platform == "tpu":
            return topology_devices(self.name)
        return gpu_devices(self)

    def abstract_mesh(self, sizes: dict[str, int]) -> AbstractMesh:
        """A mesh of these devices for shapes alone. It needs no compiler.

        Args:
            sizes: devices along each named axis; 1 for an axis without a size.
        """
        device = AbstractDevice(self.kind.device_kind, 1, self.kind.platform)
        shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
        types = (AxisType.Auto,) * len(MESH_AXES)
        return AbstractMesh(shape, MESH_AXES, axis_types=types, abstract_device=device)


def topology_devices(name: str) -> list[Any]:
    """The devices of a TPU topology, for compilation only.

    Raises:
        ValueError: libtpu is not installed, or libtpu does not know the topology.
    """
    expected = "a topology like v5e:8x8, with libtpu installed (pip install 'jax[tpu]')"
    return _compile_only(name, expected, topology_name=name, platform="tpu")


def gpu_devices(topology: Topology) -> list[Any]:
    """The devices of a GPU topology, for compilation only.

    Raises:
        ValueError: jax's CUDA plugin is not installed, or is older than 0.12.
    """
    kind, name = topology.kind, topology_shape(topology.count)
    return _compile_only(
        topology.name,
        "jax 0.12 with its CUDA plugin (pip install 'jax[cuda13]>=0.12'; no GPU is needed)",
        topology_name=name,
        topology=name,
        platform="cuda",
        target_config=target_config(kind.device_kind, kind.memory),
    )


def target_config(device_kind: str, memory: int) -> str:
    """The text that describes a GPU to XLA as its compilation target.

    Args:
        device_kind: a key of `BANDWIDTHS`.
        memory: bytes.
    """
    bandwidth = BANDWIDTHS[device_kind]
    return HOPPER.format(bandwidth=bandwidth, memory=memory, device_kind=device_kind)


def topology_shape(count: int) -> str:
    """XLA's name for a topology of `count` GPUs: partitions × hosts × GPUs per host."""
    hosts = count // GPUS_PER_HOST if count % GPUS_PER_HOST == 0 else 1
    return f"1x{hosts}x{count // hosts}"


def _compile_only(name: str, expected: str, **described: str) -> list[Any]:
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(**described).devices)
    except Exception as error:  # jaxlib raises several error types here
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"cannot compile for {name!r}: {reason}; expected {expected}") from None


def device_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of arrays, or of shapes with shardings."""

    def size(leaf: Any) -> int:
        own = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        return math.prod(own) * leaf.dtype.itemsize

    return sum(map(size, jax.tree.leaves(tree)))
