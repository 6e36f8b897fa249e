"""One product for all projections: its shapes, its dtypes, and no converted copy of a weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.nn.layers import FEW, _two_of_each, matmul

IN, HEADS, HEAD_DIM = 256, 4, 64


def operands(rows, dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((*rows, IN)), dtype)
    return x, jnp.asarray(rng.standard_normal((IN, HEADS, HEAD_DIM)), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [(1, 1), (2, 3)])
def test_product_over_the_first_axis(rows, dtype):
    x, weight = operands(rows, dtype)
    y = jax.jit(matmul)(x, weight)
    assert (y.shape, y.dtype) == ((*rows, HEADS, HEAD_DIM), jnp.dtype(dtype))
    want = np.einsum("bti,inh->btnh", np.asarray(x, np.float64), np.asarray(weight, np.float64))
    np.testing.assert_allclose(
        np.asarray(y, np.float64), want, rtol=1e-2 if dtype == "bfloat16" else 1e-4, atol=1e-4
    )


def test_result_dtype():
    x, weight = operands((1, 1), "bfloat16")
    y = matmul(x, weight, jnp.float32)
    want = np.einsum("bti,inh->btnh", np.asarray(x, np.float64), np.asarray(weight, np.float64))
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about XLA:CPU")
@pytest.mark.parametrize("rows", [(1, 1), (8, 1)])
def test_bfloat16_weights_are_not_converted_on_a_cpu(rows):
    x, weight = operands(rows, "bfloat16")
    compiled = jax.jit(matmul).lower(x, weight).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < weight.nbytes // 2


@pytest.mark.parametrize("rows", [(1,), (1, 1), (3, 1), (2, 3)])
def test_a_row_of_zeros_after_each_changes_nothing(rows):
    """What GPUs and TPUs run, on this machine's backend."""
    x, weight = operands(rows, "float32")
    y = _two_of_each(x, weight)
    want = np.einsum("...i,inh->...nh", np.asarray(x, np.float64), np.asarray(weight, np.float64))
    assert y.shape == want.shape
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows, padded", [(1, True), (FEW, True), (FEW + 1, False)])
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_accelerators_get_two_of_few_rows(rows, padded, platform):
    x, weight = operands((rows, 1), "bfloat16")
    lowered = jax.jit(matmul).trace(x, weight).lower(lowering_platforms=(platform,))
    assert ("stablehlo.pad" in lowered.as_text()) == padded
