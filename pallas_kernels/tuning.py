"""Block sizes of the kernels for each kind of device, from the JSON tables in tables/.

`python -m pallas_kernels.bench --tune` measures them and writes the tables. A device kind that
has no entry, or not for some size, gets the default's.
"""

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

import jax

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


def heads_of_piece(num_heads: int, bytes_per_head: int, piece_bytes: int) -> int:
    """The most KV heads, a divisor of them all, whose blocks fit into `piece_bytes`; at least 1."""
    fits = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
    return max((n for n in fits if n * bytes_per_head <= piece_bytes), default=1)
