"""Strict numerics and checked shapes for every test."""

import gc
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The user's folder of compiled programs is not for tests; tests of it name one of their own.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
from pathlib import Path

import jax
import pytest
from jaxtyping import install_import_hook

# Tests compile much and compute little: code for it need not be fast.
FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if jax.__version_info__ < (0, 11):  # later XLAs know no others, and refuse a flag they don't know
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))

install_import_hook(["kvjax", "pallas_kernels"], "beartype.beartype")

from kvjax import progress  # noqa: E402 - after the hook, which checks its shapes

# Tests that read standard error don't depend on how fast this machine is.
progress.PATIENCE, progress.EVERY = 1e6, 1e6

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

DATA = Path(os.environ.get("KVJAX_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


def pytest_collection_finish():
    """Modules and tests stay to the end, and tracing makes many objects that stay for a while."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Compiled programs of one file are of no use to the next; all together take gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real data and checkpoints that are not part of the repository."""
    if not DATA.is_dir():
        pytest.skip(f"no test data: KVJAX_TEST_DATA, or {DATA.name}/ beside the checkout")
    return DATA
