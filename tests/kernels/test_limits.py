"""Both sides of every limit: a named kernel says why, "auto" hands over to XLA and warns once."""

import functools

import jax
import pytest
from kernels.borders import GPU, LAYERS, TPU, ragged
from kernels.oracle import on

from pallas_kernels import api, tables


@pytest.fixture(autouse=True)
def forget_warnings(monkeypatch):
    monkeypatch.setattr(api, "_WARNED", set())


def kernels(call, implementation):
    """How many kernels a program has; those of GPUs are told by their products."""
    operation, arrays = call
    # A function of its own: jax remembers what others were traced to.
    traced = jax.make_jaxpr(lambda *x: operation(*x, implementation=implementation))(*arrays)
    return str(traced).count("pallas_call[") + ("wgmma" in str(traced))


@pytest.mark.parametrize("case", TPU)
def test_tpu(case):
    kind, fits, beyond, reason, *sizes = TPU[case]
    with on(kind, "tpu"):
        with tables.using(**sizes[0]):
            for implementation in ("auto", "pallas_tpu"):
                assert kernels(fits, implementation) == 1
        with tables.using(**sizes[-1]):
            with pytest.raises(NotImplementedError, match=reason):
                kernels(beyond, "pallas_tpu")
            with pytest.warns(RuntimeWarning, match=reason) as found:
                assert kernels(beyond, "auto") == kernels(beyond, "auto") == 0
            assert len(found) == 1


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_a_pool_may_have_millions_of_rows(dtype):
    """Of 8-bit entries too: a piece reads its own scales, not those of the pool."""
    operation, arrays = ragged(LAYERS, dtype, live=True)
    call = functools.partial(operation, span=1 << 17), arrays
    with on("TPU v5 lite", "tpu"):
        assert kernels(call, "pallas_tpu") == 1


@pytest.mark.parametrize("case", GPU)
def test_gpu(case):
    fits, beyond, reason = GPU[case]
    with on("NVIDIA H200", "gpu"):
        for implementation in ("auto", "pallas_gpu"):
            assert kernels(fits, implementation) == 1
        with pytest.raises(NotImplementedError, match=reason):
            kernels(beyond, "pallas_gpu")
        with pytest.warns(RuntimeWarning, match=reason) as found:
            assert kernels(beyond, "auto") == kernels(beyond, "auto") == 0
        assert len(found) == 1


@pytest.mark.parametrize("kind", ["NVIDIA B200", "NVIDIA A100-SXM4-80GB", "AMD Instinct MI300X"])
def test_other_gpus(kind):
    fits, *_ = GPU["slots"]
    with on(kind, "gpu"), pytest.warns(RuntimeWarning, match=f"instructions, which {kind} does"):
        assert kernels(fits, "auto") == 0
