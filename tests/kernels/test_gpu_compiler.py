"""The GPU kernels at the shapes of real models: lowered everywhere, compiled where CUDA's are.

`make test-aot-gpu` installs jax's CUDA plugin, which compiles for a virtual H200; no GPU is needed.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from cuda import needs_cuda
from jax.sharding import SingleDeviceSharding
from kernels import borders
from kernels.hlo import copies
from kernels.loops import KINDS, decode_loop, largest
from kernels.oracle import on

import pallas_kernels
from kvjax.capacity.devices import Topology
from pallas_kernels import Quantized
from pallas_kernels.bench.cases import GQA, MLA
from pallas_kernels.entries import is_quantized
from pallas_kernels.gpu import limits

ENTRIES = ["bfloat16", "int8", "float8_e4m3fn"]
CAPACITIES = (32, 3200, 64, 512, 2080, 96, 1024, 1184)


def shape(size, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(size, jnp.dtype(dtype))


def entries(size, dtype):
    values = shape(size, dtype)
    return Quantized(values, shape(size[:-1], "float32")) if is_quantized(dtype) else values


def gqa(model, dtype):
    B, S, (N, K, H) = 8, 8192, GQA[model]
    k = entries((B, K, S, H), dtype)
    settings = {"window": 4096, "softcap": 50.0, "implementation": "pallas_gpu"}
    operation = functools.partial(pallas_kernels.gqa_decode, **settings)
    return operation, shape((B, N, H)), k, k, shape((B,), "int32")


def head_dim(H):
    B, K, S = 4, 2, 1000
    k = shape((B, K, S, H))
    operation = functools.partial(pallas_kernels.gqa_decode, implementation="pallas_gpu")
    return operation, shape((B, K, H)), k, k, shape((B,), "int32")


def ragged(dtype):
    B, (N, K, H) = 8, GQA["llama-3-8b"]
    starts = tuple(sum(CAPACITIES[:head]) for head in range(K))
    pool = entries((B, sum(CAPACITIES), H), dtype)

    def operation(q, k, v, lengths, live):
        settings = {"capacities": CAPACITIES, "live": live, "implementation": "pallas_gpu"}
        return pallas_kernels.ragged_gqa_decode(q, k, v, starts, lengths, **settings)

    live = shape(pool.shape[:2], "bool")
    return operation, shape((B, N, H)), pool, pool, shape((B, K), "int32"), live


def ragged_of_each_sequence(dtype):
    B, (N, K, H) = 8, GQA["llama-3-8b"]
    pool = entries((B, 8192, H), dtype)

    def operation(q, k, v, starts, lengths):
        settings = {"align": 16, "implementation": "pallas_gpu"}
        return pallas_kernels.ragged_gqa_decode(q, k, v, starts, lengths, **settings)

    return operation, shape((B, N, H)), pool, pool, shape((B, K), "int32"), shape((B, K), "int32")


def mla(model, dtype):
    B, S, (N, L, R) = 8, 4096, MLA[model]
    settings = {"scale": 0.1, "window": 1000, "implementation": "pallas_gpu"}
    operation = functools.partial(pallas_kernels.mla_decode, **settings)
    held = entries((B, S, L), dtype), entries((B, S, R), dtype)
    return operation, shape((B, N, L)), shape((B, N, R)), *held, shape((B,), "int32")


CASES = {
    **{f"gqa-{m}-{d}": functools.partial(gqa, m, d) for m in GQA for d in ENTRIES},
    **{f"gqa-{H}": functools.partial(head_dim, H) for H in (64, 96, 256)},
    **{f"ragged-{d}": functools.partial(ragged, d) for d in ENTRIES},
    **{f"ragged-traced-{d}": functools.partial(ragged_of_each_sequence, d) for d in ENTRIES[:2]},
    **{f"mla-{m}-{d}": functools.partial(mla, m, d) for m in MLA for d in ENTRIES},
}


def lower(case, sharding=None):
    operation, *arguments = CASES[case]()
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
    )
    with on("NVIDIA H200", "gpu", cores=132):
        return jax.jit(operation).trace(*arguments).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize(
    "case", ["gqa-qwen2.5-7b-bfloat16", "gqa-96", "ragged-int8", "mla-deepseek-v3-float8_e4m3fn"]
)
def test_lowering(case):
    """A few in every run; all are lowered where they are compiled."""
    assert lower(case).as_text().count("mosaic_gpu") >= 1


@pytest.mark.parametrize("case", ["gqa-96", "ragged-int8", "mla-deepseek-v3-bfloat16"])
def test_lowering_with_64_bit_types(case):
    """Whole numbers in the kernels stay int32."""
    with jax.enable_x64(True):
        assert lower(case).as_text().count("mosaic_gpu") >= 1


@needs_cuda
@pytest.mark.aot
@pytest.mark.parametrize("case", CASES)
def test_compilation(case):
    """Shared memory suffices, and nothing of the entries' size is copied on the way."""
    compiled = lower(case, SingleDeviceSharding(virtual_h200())).compile()
    largest = max(x.size for x in jax.tree.leaves(CASES[case]()[1:]))
    assert not copies(compiled.as_text(), largest // 8)


@needs_cuda
@pytest.mark.aot
@pytest.mark.parametrize("case", borders.GPU)
def test_limits_are_the_compilers(case, monkeypatch):
    """What they let pass compiles; what shared memory does not hold, or is mixed, does not."""
    fits, beyond, reason = borders.GPU[case]
    here = SingleDeviceSharding(virtual_h200())

    def compile_(call):
        operation, arrays = call
        run = functools.partial(operation, implementation="pallas_gpu")
        arrays = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), arrays
        )
        with on("NVIDIA H200", "gpu", cores=132):
            return jax.jit(run).trace(*arrays).lower(lowering_platforms=("cuda",)).compile()

    compile_(fits)
    if "shared" in reason or "entries" in reason:
        monkeypatch.setattr(limits, "arrays", lambda *_: None)
        # The trace, Pallas, MLIR or the compiler fails, each with errors of its own.
        with pytest.raises(Exception, match=r"."):
            compile_(beyond)


@needs_cuda
@pytest.mark.aot
@pytest.mark.parametrize("kind", KINDS)
def test_decode_loop_writes_in_place(kind):
    decode, cache, x = decode_loop(kind, "bfloat16", slots=4096)
    here = SingleDeviceSharding(virtual_h200())
    cache, x = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), (cache, x)
    )
    with on("NVIDIA H200", "gpu", cores=132):
        lowered = (
            jax.jit(decode, donate_argnums=0).trace(cache, x).lower(lowering_platforms=("cuda",))
        )
    assert lowered.as_text().count("mosaic_gpu") >= 1
    assert not copies(lowered.compile().as_text(), largest(cache) // 4, where="not entry")


@functools.cache
def virtual_h200():
    return Topology.parse("h200:1").devices()[0]
