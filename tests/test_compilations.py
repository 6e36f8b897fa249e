"""`compilations.counted` sees what jax does, and tells what the persistent cache had."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import counted
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture
def persistent_cache(tmp_path):
    """A folder of this test's own, and jax as it was."""
    names = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in names.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def double():
    """A function that no other test has compiled."""
    return lambda x: x * 2


def test_each_program_counts_once(double):
    x, y = np.ones(3, np.float32), np.ones(4, np.float32)
    function = jax.jit(double)
    with counted() as programs:
        function(x)
        function(x)
        assert programs.traced == ["<lambda>"]
        assert programs.lowered == programs.compiled == ["jit(<lambda>)"]
        function(y)
    function(np.ones(5, np.float32))
    assert programs.traced == ["<lambda>"] * 2
    assert programs.lowered == programs.compiled == ["jit(<lambda>)"] * 2
    assert programs.from_cache == []


def test_inner_functions_are_parts_of_the_program_that_calls_them(double):
    def twice(x):
        return inner(x) + inner(x + 1)

    inner = jax.jit(double)
    with counted() as programs:
        jax.jit(twice)(np.ones(3, np.float32))
    assert programs.traced == ["twice"]
    assert programs.compiled == ["jit(twice)"]


def test_what_the_persistent_cache_has_is_not_compiled(double, persistent_cache):
    x = jnp.ones(3)
    with counted() as programs:
        jax.jit(double)(x)
        jax.clear_caches()
        jax.jit(double)(x)
    assert programs.traced == ["<lambda>"] * 2
    assert programs.compiled == programs.from_cache == ["jit(<lambda>)"]


def test_an_error_while_tracing_is_no_program(double):
    def broken(x):
        raise KeyError("broken")

    with counted() as programs, pytest.raises(KeyError):
        jax.jit(broken)(np.ones(3, np.float32))
    with counted() as later:
        jax.jit(double)(np.ones(3, np.float32))
    assert programs.compiled == [] and later.compiled == ["jit(<lambda>)"]
