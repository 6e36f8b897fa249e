"""NVIDIA GPUs that are not here, in the words of XLA, which compiles for them all the same."""

from __future__ import annotations

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

# NVIDIA's data sheets, SXM: bytes a second.
BANDWIDTHS = {
    "NVIDIA H100 80GB HBM3": 3_350_000_000_000,
    "NVIDIA H200": 4_800_000_000_000,
}
NODE = 8  # GPUs of a host


def target_config(device_kind: str, memory: int) -> str:
    """XLA's target configuration, as text.

    Args:
        device_kind: a key of `BANDWIDTHS`.
        memory: bytes.
    """
    bandwidth = BANDWIDTHS[device_kind]
    return HOPPER.format(bandwidth=bandwidth, memory=memory, device_kind=device_kind)


def topology_shape(count: int) -> str:
    """Partitions × hosts × GPUs of each, as XLA names a topology of so many GPUs."""
    hosts = count // NODE if count % NODE == 0 else 1
    return f"1x{hosts}x{count // hosts}"
