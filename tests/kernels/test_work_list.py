"""The work list: every live row once, and not a block more than they need."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.headkv import allocate, load_scores
from pallas_kernels import plan
from pallas_kernels.entries import Segments
from pallas_kernels.plan import WorkList, combine, flatten, touched
from pallas_kernels.tpu.kernel import Blocks, PoolBlocks
from pallas_kernels.tpu.limits import block_size
from pallas_kernels.tpu.operations import ragged_work_list

BLOCK = 512


def walk(blocks: Blocks, work: WorkList, shares: int):
    """The pieces of all grid steps, those beyond the list left out, as numpy."""
    steps = int(work.bounds[1])
    share, step = np.divmod(np.arange(shares * steps, dtype=np.int32), steps)
    pieces = jax.vmap(lambda *at: blocks.piece(*at, work))(share, step)
    return jax.tree.map(lambda x: np.asarray(x)[np.asarray(pieces.valid)], pieces)


def test_headkv_budgets_of_llama_3(data_dir):
    """Blocks visited in every layer, and rows read in some, with the published scores."""
    name = "Meta-Llama-3-8B-Instruct_retrieval_reasoning_heads.json.gz"
    scores = load_scores(data_dir / "head_scores" / "headkv" / name)
    caps = allocate(scores, kv_size=1024, window=8, beta=1.01, num_kv_heads=8) + 8
    assert caps.max() > 20 * caps.min()
    count = jax.jit(lambda lengths: flatten(jnp.zeros_like(lengths), lengths, BLOCK).bounds[0])
    for layer in caps:
        assert int(count(jnp.asarray(layer))) == np.sum(-(-layer // BLOCK))
    for layer in caps[::8]:
        ends = np.cumsum(-(-layer // 16) * 16, dtype=np.int32)
        starts, P = np.stack([np.append(0, ends[:-1])] * 2).astype(np.int32), int(ends[-1])
        segments = Segments(jnp.asarray(starts), jnp.asarray(np.stack([layer] * 2)), 16)
        size = block_size(P, BLOCK)
        lengths = jnp.asarray(np.stack([layer, layer // 3]))
        work = ragged_work_list(segments, lengths, 4, P, block=BLOCK, shares=2)
        pieces = walk(PoolBlocks(size, 1, 8, P, 16), work, shares=2)
        assert size == BLOCK
        assert len(pieces.owner) == int(work.bounds[0]) == np.sum(-(-np.asarray(lengths) // BLOCK))
        assert np.all(pieces.row >= 0) and np.all(pieces.row + size <= P)
        seen = np.zeros((2, P), int)
        for owner, row, low, high in zip(*pieces[2:3], *pieces[4:], strict=True):
            seen[owner // 8, row + low : row + high] += 1
        live = np.zeros((2, P), int)
        for b in range(2):
            for start, length in zip(starts[b], np.asarray(lengths[b]), strict=True):
                live[b, start : start + length] = 1
        np.testing.assert_array_equal(seen, live)


@pytest.mark.parametrize("shares", [1, 3])
@pytest.mark.parametrize("window", [None, 1, 100])
def test_dense_slots(window, shares):
    lengths = jnp.asarray([0, 1, 63, 64, 65, 300, 0], jnp.int32)
    work = flatten(jnp.zeros_like(lengths), lengths, 64, 7 * 5, window, shares)
    pieces = walk(Blocks(64, 1), work, shares)
    seen = np.zeros((7, 320), int)
    for owner, block, low, high in zip(
        pieces.owner, pieces.block, pieces.low, pieces.high, strict=True
    ):
        assert low < high
        seen[owner, block * 64 + low : block * 64 + high] += 1
    slot = np.arange(320)[None]
    first = 0 if window is None else np.maximum(np.asarray(lengths)[:, None] - window, 0)
    np.testing.assert_array_equal(seen, (slot < np.asarray(lengths)[:, None]) & (slot >= first))


def test_shares_are_equal_and_merge():
    """Segments that two shares cut are merged; what a share did not write is not read."""
    lengths = jnp.asarray([5, 0, 2], jnp.int32)
    work = flatten(jnp.zeros_like(lengths), lengths, 1, 10, shares=2)
    np.testing.assert_array_equal(work.bounds, [7, 4])
    written = touched(work, 1, 2)
    np.testing.assert_array_equal(written, [[True, False, False], [True, False, True]])
    out = jnp.where(written, jnp.asarray([[1.0, 0, 0], [5.0, 0, 7.0]]), jnp.nan)
    lse = jnp.where(written, jnp.log(jnp.asarray([[3.0, 1, 1], [1.0, 1, 2.0]])), jnp.nan)
    out, lse = combine(out[:, :, None, None, None], lse[:, :, None, None], work, 1)
    np.testing.assert_allclose(out.reshape(-1), [2.0, 0.0, 7.0], rtol=1e-6)
    np.testing.assert_allclose(lse.reshape(-1), [np.log(4.0), -1e30, np.log(2.0)], rtol=1e-6)


def test_long_lists_find_the_same_owners(monkeypatch):
    """By a search instead of comparing every segment with every piece."""
    lengths = jnp.asarray([0, 130, 0, 0, 64, 1, 700, 0], jnp.int32)
    lists = []
    for compared in (plan.COMPARED, 0):
        monkeypatch.setattr(plan, "COMPARED", compared)
        lists += [
            flatten(jnp.zeros_like(lengths), lengths, 64, most, None, 3) for most in (None, 40)
        ]
    for short, long in zip(lists[:2], lists[2:], strict=True):
        np.testing.assert_array_equal(short.owners, long.owners)
    np.testing.assert_array_equal(lists[1].owners[:16], [1] * 3 + [4, 5] + [6] * 11)


def test_a_wrong_bound_cuts_the_list():
    lengths = jnp.asarray([640, 640], jnp.int32)
    work = flatten(jnp.zeros_like(lengths), lengths, 64, 12, shares=2)
    np.testing.assert_array_equal(work.bounds, [12, 6])
    assert work.owners.shape == (12,)
