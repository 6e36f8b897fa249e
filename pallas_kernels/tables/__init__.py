"""The block sizes of the kernels for each kind of device.

The numbers are in the JSON files of this folder, which `python -m pallas_kernels.bench --tune`
measures and writes. A kind of device without an entry has the default's sizes.
"""

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

import jax

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
    return json.loads((files("pallas_kernels.tables") / f"{platform}.json").read_text())
