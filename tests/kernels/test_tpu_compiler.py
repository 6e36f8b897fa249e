"""The TPU kernels through libtpu's compiler, at the shapes of real models: `make test-aot`.

No TPU is needed. The interpreter passes kernels that hardware refuses; here Mosaic lowers them for
each generation, with its tiles, its VMEM and its instructions.
"""

import os

import pytest

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
pytest.importorskip("libtpu", reason="needs libtpu: make test-aot")

import functools

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding
from kernels import borders
from kernels.hlo import copies, moves
from kernels.loops import KINDS, decode_loop, largest

import pallas_kernels
from pallas_kernels import Quantized, tables
from pallas_kernels.bench.cases import GQA, MLA
from pallas_kernels.entries import is_quantized
from pallas_kernels.tpu import limits

pytestmark = pytest.mark.aot

TOPOLOGIES = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]
ENTRIES = ["bfloat16", "int8", "float8_e4m3fn", "float32"]


@functools.cache
def device_of(topology):
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]


def shape(size, dtype):
    return jax.ShapeDtypeStruct(size, jnp.dtype(dtype))


def entries(size, dtype):
    values = shape(size, dtype)
    return Quantized(values, shape(size[:-1], "float32")) if is_quantized(dtype) else values


def queries(size, dtype):
    return shape(size, "float32" if dtype == "float32" else "bfloat16")


def compile_for(topology, operation, *arguments, **jit_options):
    """The program for one device of the topology, which has one kernel."""
    device = device_of(topology)
    abstract = AbstractDevice(device.device_kind, device.num_cores, "tpu")
    here = SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), arguments
    )
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=abstract)):
        traced = jax.jit(operation, **jit_options).trace(*arguments)
    lowered = traced.lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("tpu_custom_call") == 1
    return lowered.compile()


@pytest.mark.parametrize("dtype", ENTRIES)
@pytest.mark.parametrize("model", GQA)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_gqa_decode(topology, model, dtype):
    B, S, (N, K, H) = 8, 8192, GQA[model]
    k = entries((B, K, S, H), dtype)
    operation = functools.partial(
        pallas_kernels.gqa_decode, window=4096, softcap=50.0, implementation="pallas_tpu"
    )
    compile_for(topology, operation, queries((B, N, H), dtype), k, k, shape((B,), "int32"))


@pytest.mark.parametrize("H", [64, 96, 256])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_gqa_decode_with_other_head_dims(topology, H):
    B, K, S, dtype = 4, 2, 1000, "bfloat16"
    k = entries((B, K, S, H), dtype)
    operation = functools.partial(pallas_kernels.gqa_decode, implementation="pallas_tpu")
    compile_for(topology, operation, queries((B, K, H), dtype), k, k, shape((B,), "int32"))


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_scales_and_visible_rows_of_a_pool_of_all_layers(topology, live):
    """A piece reads its own of them, so millions of rows need no more of the vector memory."""
    operation, arrays = borders.ragged(borders.LAYERS, "int8", live=live)
    run = functools.partial(operation, span=1 << 17, implementation="pallas_tpu")
    compiled = compile_for(topology, run, *arrays)
    assert not moves(compiled.as_text(), borders.LAYERS // 2)


@pytest.mark.parametrize("dtype", ENTRIES)
@pytest.mark.parametrize("segments", ["fixed", "of_each_sequence"])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_ragged_gqa_decode(topology, segments, dtype):
    B, (N, K, H) = 8, GQA["llama-3-8b"]
    capacities = (32, 3200, 64, 512, 2080, 96, 1024, 1184)
    starts = tuple(sum(capacities[:head]) for head in range(K))
    pool = entries((B, sum(capacities), H), dtype)
    q, lengths = queries((B, N, H), dtype), shape((B, K), "int32")
    run = functools.partial(pallas_kernels.ragged_gqa_decode, implementation="pallas_tpu")
    if segments == "fixed":

        def operation(q, k, v, lengths, live):
            return run(q, k, v, starts, lengths, capacities=capacities, live=live)

        compile_for(topology, operation, q, pool, pool, lengths, shape(pool.shape[:2], "bool"))
    else:

        def operation(q, k, v, starts, lengths):
            return run(q, k, v, starts, lengths, align=32)

        compile_for(topology, operation, q, pool, pool, shape((B, K), "int32"), lengths)


@pytest.mark.parametrize("dtype", ENTRIES)
@pytest.mark.parametrize("model", MLA)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_mla_decode(topology, model, dtype):
    B, S, (N, L, R) = 8, 4096, MLA[model]
    operation = functools.partial(
        pallas_kernels.mla_decode, scale=0.1, window=1000, implementation="pallas_tpu"
    )
    q = queries((B, N, L), dtype), queries((B, N, R), dtype)
    held = entries((B, S, L), dtype), entries((B, S, R), dtype)
    compile_for(topology, operation, *q, *held, shape((B,), "int32"))


TOPOLOGY = dict(zip((borders.V5E, borders.V5P, borders.V6E), TOPOLOGIES, strict=False))


@pytest.mark.parametrize("case", borders.TPU)
def test_limits_are_the_compilers(case, monkeypatch):
    """What they let pass compiles; what no memory holds does not."""
    kind, fits, beyond, reason, *sizes = borders.TPU[case]

    def compile_with(call, sizes):
        operation, arrays = call
        run = functools.partial(operation, implementation="pallas_tpu")
        with tables.using(**sizes):
            compile_for(TOPOLOGY[kind], run, *arrays)

    compile_with(fits, sizes[0])
    if reason in (borders.PIECE, borders.LIST):
        monkeypatch.setattr(limits, "memory", lambda *_: None)
        with pytest.raises(jax.errors.JaxRuntimeError):
            compile_with(beyond, sizes[-1])


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_decode_loop_writes_in_place(kind, dtype):
    """Outside of it XLA changes the layout of arrays that are narrower than 128 lanes, once."""
    decode, cache, x = decode_loop(kind, dtype, slots=4096)
    compiled = compile_for("v5e:2x2", decode, cache, x, donate_argnums=0)
    assert not copies(compiled.as_text(), largest(cache) // 4, where="not entry")


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_that_fits_into_vmem_stays_where_it_lies(kind, dtype):
    """A kernel reads live rows alone, and a step writes one: XLA is not to move the rest."""
    decode, cache, x = decode_loop(kind, dtype, slots=512)
    compiled = compile_for("v5e:2x2", decode, cache, x, donate_argnums=0)
    assert not moves(compiled.as_text(), largest(cache) // 4)
