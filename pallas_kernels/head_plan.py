"""Which device holds which heads of ragged pools, so that the bytes balance."""

import numpy as np
from jaxtyping import Int


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
