"""A decode loop writes into its cache: nothing of the cache's size is copied in a step."""

import jax
import pytest
from kernels.hlo import copies
from kernels.loops import KINDS, decode_loop, largest


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_decode_loop_writes_in_place(kind, dtype):
    """On this machine; for TPUs and GPUs see test_tpu_compiler.py and test_gpu_compiler.py."""
    decode, cache, x = decode_loop(kind, dtype, slots=1024)
    compiled = jax.jit(decode, donate_argnums=0).lower(cache, x).compile()
    found = copies(compiled.as_text(), largest(cache) // 4, where="loop")
    assert not found
    assert compiled.memory_analysis().alias_size_in_bytes >= 0.99 * sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)
    )
