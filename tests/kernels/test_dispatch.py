"""Which implementation serves: the platform's kernel where it can, and never another in silence."""

import functools
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec
from kernels.oracle import on
from pools import empty_pool

import pallas_kernels
from kvjax.cache import AttentionSpec, DenseCache, LatentCache
from pallas_kernels import api, tables
from pallas_kernels.tpu.limits import heads_of_piece

B, N, K, S, H = 2, 4, 2, 128, 64


on_tpu = functools.partial(on, "TPU v6 lite", "tpu")


@pytest.fixture(autouse=True)
def forget_warnings(monkeypatch):
    monkeypatch.setattr(api, "_WARNED", set())


def gqa(dtype="bfloat16", **settings):
    q, k = jnp.zeros((B, N, H), dtype), jnp.zeros((B, K, S, H), dtype)
    return pallas_kernels.gqa_decode(q, k, k, jnp.zeros((B,), jnp.int32), **settings)


def ragged(start, **settings):
    q, pool = jnp.zeros((B, N, H), jnp.bfloat16), jnp.zeros((B, S, H), jnp.bfloat16)
    lengths = jnp.zeros((B, K), jnp.int32)
    return pallas_kernels.ragged_gqa_decode(q, pool, pool, (0, start), lengths, **settings)


def kernels(f):
    """How many kernels a program has."""
    return str(jax.make_jaxpr(f)()).count("pallas_call[")


def test_auto_takes_the_kernel_of_the_platform():
    assert kernels(gqa) == 0
    with on_tpu():
        assert kernels(gqa) == kernels(lambda: ragged(64)) == 1
        assert kernels(lambda: gqa(implementation="xla")) == 0


@pytest.mark.parametrize(
    ("kind", "call", "reason"),
    [
        ("TPU v6 lite", lambda: gqa("float16"), "gqa_decode .*TPUs have no float16"),
        ("TPU v6 lite", lambda: ragged(40), "ragged_gqa_decode .*8 rows, and bfloat16 needs 16"),
        ("TPU v4", gqa, "gqa_decode .*refuses it for TPU v4"),
    ],
)
def test_auto_leaves_to_xla_what_the_kernel_cannot_serve(kind, call, reason):
    with on(kind, "tpu"):
        with pytest.warns(RuntimeWarning, match=reason) as found:
            assert kernels(call) == 0
        assert len(found) == 1


def test_a_reason_is_told_once_whatever_its_numbers():
    with on_tpu():
        with pytest.warns(RuntimeWarning, match="multiples of 8 rows, and bfloat16 needs 16"):
            ragged(40)
        ragged(40)  # warnings are errors
        ragged(36 + 8)
        with pytest.warns(RuntimeWarning, match="float16"):
            gqa("float16")


def test_auto_takes_no_kernel_where_the_compiler_partitions():
    """XLA cannot cut a kernel; under shard_map each device has a program of its own."""
    with on_tpu(axes=("model",)):
        with pytest.warns(RuntimeWarning, match="mesh axes model: call it under jax.shard_map"):
            assert kernels(gqa) == 0
        specs = {"in_specs": (), "out_specs": PartitionSpec()}
        assert kernels(jax.shard_map(gqa, **specs, check_vma=False)) == 1


def test_auto_says_why_it_takes_no_kernel_on_a_host_with_several_devices(monkeypatch):
    """Where a program will run is unknown when it is traced. These are eight CPUs."""
    assert kernels(lambda: gqa()) == 0  # and no warning where there are no kernels
    device = types.SimpleNamespace(platform="tpu", device_kind="TPU v6 lite")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    reason = r"gqa_decode .*there are 8 devices.*kvjax.load\(…, mesh=…\)"
    with pytest.warns(RuntimeWarning, match=reason) as found:
        assert kernels(lambda: gqa()) == kernels(lambda: gqa()) == 0
    assert len(found) == 1
    assert kernels(lambda: gqa(implementation="xla")) == 0
    assert kernels(lambda: gqa(implementation="pallas_tpu")) == 1
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert kernels(lambda: gqa()) == 1


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])
def test_a_named_implementation_needs_its_platform(implementation):
    with pytest.raises(NotImplementedError, match=r"gqa_decode with .*, and this is a cpu"):
        gqa(implementation=implementation)
    with (
        on("NVIDIA H200", "gpu" if implementation == "pallas_tpu" else "tpu"),
        pytest.raises(NotImplementedError, match="and this is a "),
    ):
        ragged(64, implementation=implementation)


def test_a_named_implementation_says_why_it_cannot_serve():
    with on_tpu():
        with pytest.raises(NotImplementedError, match="TPUs have no float16"):
            gqa("float16", implementation="pallas_tpu")
        with pytest.raises(NotImplementedError, match="multiples of 8 rows, and bfloat16 needs 16"):
            ragged(40, implementation="pallas_tpu")
    with on("TPU v4", "tpu"), pytest.raises(NotImplementedError, match="TPU v4"):
        gqa(implementation="pallas_tpu")


def test_caches_use_the_kernels():
    x = {n: jnp.zeros((B, 1, n, H), jnp.bfloat16) for n in (1, K, N)}
    positions, spec = jnp.zeros((B, 1), jnp.int32), AttentionSpec(1.0, window=32)
    dense = DenseCache.create(B, K, S, H, H, "bfloat16")
    latent = LatentCache.create(B, S, H, H, "bfloat16")
    absorbed = (x[N], x[N], x[1][:, :, 0], x[1][:, :, 0], positions, spec)
    with on_tpu():
        budget = empty_pool((32, 96), B, H, "bfloat16", positions=True, align=16).layer(0)
        for cache in (dense, budget):
            assert kernels(lambda c=cache: c.attend(x[N], x[K], x[K], positions, spec)[0]) == 1
        assert kernels(lambda: latent.attend_absorbed(*absorbed)[0]) == 1


def test_sizes_come_from_the_device_or_the_default():
    for operation in ("gqa_decode", "ragged_gqa_decode", "mla_decode"):
        default = tables.sizes("tpu", operation, "TPU of the future")
        assert default == tables.table("tpu")["default"][operation]
        assert tables.sizes("tpu", operation, "TPU v5") == default | {"shares": 2}


def test_a_gpu_has_a_share_for_each_multiprocessor():
    for operation in ("gqa_decode", "ragged_gqa_decode", "mla_decode"):
        sizes = functools.partial(tables.sizes, "gpu", operation, "NVIDIA H100 PCIe")
        assert sizes() == sizes(1) == sizes(132) == tables.table("gpu")["default"][operation]
        assert sizes(114) == sizes() | {"shares": 114}
        with tables.using(shares=3):
            assert sizes(114) == sizes() | {"shares": 3}
    assert tables.sizes("tpu", "mla_decode", "TPU v6 lite", 2)["shares"] == 1
    with on("NVIDIA H100 PCIe", "gpu", cores=114):
        assert api.target().cores == 114


def test_chosen_sizes_are_part_of_a_programs_key():
    """A function that jit knows is traced again with other sizes."""
    seen = []

    @jax.jit
    def traced():
        seen.append(tables.sizes("tpu", "mla_decode", "TPU v6 lite")["block"])
        return 0

    for block in (128, 256, 128):
        with tables.using(block=block):
            traced()
    assert seen == [128, 256]


@pytest.mark.parametrize(
    ("heads", "size", "room", "want"),
    [(8, 10, 80, 8), (8, 10, 79, 4), (6, 10, 45, 3), (7, 99, 9, 1)],
)
def test_heads_of_a_piece(heads, size, room, want):
    assert heads_of_piece(heads, size, room) == want
