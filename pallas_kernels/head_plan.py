"""Which device holds which heads of ragged pools, so that the bytes balance."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from pallas_kernels.segments import DeviceSegments


def assign_heads(sizes: Int[np.ndarray, "L K"], devices: int) -> Int[np.ndarray, "L K"]:
    """For every layer an order of its heads in which the first K / devices go to the first device,
    and so on, so that all devices hold nearly as many rows of all layers together.

    One layer alone may not balance (with as many heads as devices its largest head decides), all
    layers do: greedily, layers by their largest head, and in each layer the largest heads to the
    devices that hold least (longest processing time first: Graham, 1969).

    Args:
        sizes: rows of every head.

    Raises:
        ValueError: the devices do not divide the heads.
    """
    L, K = sizes.shape
    if K % devices:
        raise ValueError(f"got {K} KV heads, expected a multiple of {devices} devices")
    load, orders = np.zeros(devices, np.int64), np.zeros((L, K), np.int64)
    for layer in np.argsort(-sizes.max(axis=1), kind="stable"):
        places: list[list[int]] = [[] for _ in range(devices)]
        for head in np.argsort(-sizes[layer], kind="stable"):
            free = [d for d in range(devices) if len(places[d]) < K // devices]
            device = min(free, key=lambda d: load[d])
            places[device].append(int(head))
            load[device] += sizes[layer, head]
        orders[layer] = [head for heads in places for head in sorted(heads)]
    return orders


def lay_out(
    capacities: tuple[tuple[int, ...], ...], devices: int, align: int
) -> tuple[tuple[DeviceSegments, ...], int]:
    """The segments of all layers in one pool on every device, and the rows of that pool.

    Args:
        capacities: rows of every head of every layer; each device's heads stand together.
        align: starts, spans and the pool's end are multiples of it.

    Raises:
        ValueError: the devices do not divide the heads.
    """
    at, layers = np.zeros(devices, np.int64), []
    for layer in capacities:
        if len(layer) % devices:
            raise ValueError(f"got {len(layer)} KV heads, expected a multiple of {devices} devices")
        own = np.asarray(layer, np.int64).reshape(devices, -1)
        sizes = -(-own // align) * align
        ends = np.cumsum(sizes, axis=1)
        layers.append((at[:, None] + ends - sizes, own, int(ends[:, -1].max())))
        at = at + ends[:, -1]
    segments = (
        DeviceSegments(_nested(starts), _nested(own), align, max(span, align))
        for starts, own, span in layers
    )
    return tuple(segments), max(int(at.max()), align)


def _nested(table: Int[np.ndarray, "D K"]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(value) for value in row) for row in table)
