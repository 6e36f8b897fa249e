"""A step of decoding writes into the pool: no layer's program copies it, wherever its rows are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.hlo import copies
from meshes import GQA, MLA, WINDOWED, toy
from toys import cast

import kvjax
from kvjax.nn.transformer import block_kinds, block_program

B, T = 2, 256
POOLS = [
    ("float32", "snapkv:kv_size=200"),
    ("bfloat16", "snapkv:kv_size=200"),
    ("float32", "snapkv:kv_size=200,entries=int8"),
    ("bfloat16", "snapkv:kv_size=200,entries=int4"),
]
CASES = [*POOLS, ("float32", "full"), ("bfloat16", "full")]


def prefilled(attention, dtype, policy):
    """A model, its parameters, and the cache of long prompts."""
    model, params = toy(*attention)
    params = cast(params, dtype)
    tokens = np.random.default_rng(0).integers(0, 64, (B, T)).astype(np.int32)
    lengths = np.asarray([T, T - 20], np.int32)
    return model, params, kvjax.prefill(model, params, tokens, lengths, policy)[1]


def held(cache):
    """What holds most of a cache: the arrays of its pools, or each layer's own."""
    largest = max(leaf.size for leaf in jax.tree.leaves(cache))
    return [leaf for leaf in jax.tree.leaves(cache) if leaf.size > largest // 4]


@pytest.mark.parametrize(("dtype", "policy"), CASES)
@pytest.mark.parametrize("attention", [(GQA, WINDOWED), (MLA,)], ids=["gqa", "mla"])
def test_the_arrays_stay_where_they_are(attention, dtype, policy):
    model, params, cache = prefilled(attention, dtype, policy)
    token = np.zeros(B, np.int32)
    _, cache = kvjax.decode_step(model, params, cache, token)
    before = [leaf.unsafe_buffer_pointer() for leaf in held(cache)]
    for _ in range(3):
        _, cache = kvjax.decode_step(model, params, cache, token)
    assert [leaf.unsafe_buffer_pointer() for leaf in held(cache)] == before


@pytest.mark.parametrize(("dtype", "policy"), POOLS)
def test_the_program_of_a_layer_copies_no_pool(dtype, policy):
    model, params, cache = prefilled((GQA, WINDOWED), dtype, policy)
    x = jax.device_put(np.zeros((B, 1, model.config.hidden_size), jnp.dtype(dtype)))
    positions, lengths = np.full((B, 1), T, np.int32), cache.rope_lengths
    for index, kind in enumerate(block_kinds(model.config)):
        layer = cache[index]
        size = max(leaf.size for leaf in jax.tree.leaves(layer))
        program = block_program(kind.block, donate=True)
        arguments = (params[f"layers_{index}"], kind.pairs, x, positions, layer, lengths)
        compiled = program.lower(*arguments).compile()
        assert copies(compiled.as_text(), size // 2) == []
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes >= 0.99 * sum(leaf.nbytes for leaf in held(layer))
