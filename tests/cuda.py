"""Whether XLA compiles for NVIDIA GPUs here."""

from importlib.util import find_spec

import pytest

needs_cuda = pytest.mark.skipif(
    find_spec("jax_plugins.xla_cuda13") is None if find_spec("jax_plugins") else True,
    reason="needs jax's CUDA plugin: make test-aot-gpu",
)
