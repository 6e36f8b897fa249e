"""The benchmarks of long contexts at tiny sizes: their arithmetic, and one layer at a time."""

import dataclasses

import numpy as np
import pytest

from benchmarks import long_context_attention as attention
from benchmarks import long_context_memory as memory
from kvjax.cache.storage import room_bucket

MEMORY = memory.Size(
    layers=2, hidden=32, heads=2, kv_heads=1, head_dim=32, mlp=32, vocab=16, tokens=8192, kv_size=16
)
ATTENTION = attention.Size(
    tokens=256, layers=1, kv_heads=2, group=2, head_dim=16, room=8, repeats=1
)


@pytest.fixture(scope="module")
def rows():
    return {setting: memory.reserved(setting, MEMORY) for setting in memory.SETTINGS}


def test_bytes_are_those_of_the_caches(rows):
    room = MEMORY.layer_bytes // MEMORY.tokens * room_bucket(MEMORY.new_tokens)
    counters = 4  # a length for each layer, and one for RoPE
    full = MEMORY.layers * (MEMORY.layer_bytes + room + counters) + counters
    assert rows["full"].cache_bytes == full
    kept = MEMORY.layers * MEMORY.layer_bytes // MEMORY.tokens * MEMORY.kv_size
    held = rows["headkv"].cache_bytes - MEMORY.layers * room
    tables = 128
    assert kept < held < 1.12 * kept + tables < 0.01 * full
    assert rows["no cache"].cache_bytes == 0 and rows["no cache"].decode is None
    for row in rows.values():
        assert row.reserved_peak >= row.prefill.temporaries + row.cache_bytes


def test_prefill_holds_the_keys_and_values_of_one_layer_at_a_time(rows):
    once = rows["no cache"].prefill.total
    assert once < 4 * MEMORY.layer_bytes + 2 * MEMORY.tokens * MEMORY.hidden * 4
    assert (
        rows["headkv"].prefill.total - rows["headkv"].cache_bytes <= once + MEMORY.layer_bytes / 4
    )
    others = rows["full"].cache_bytes * (MEMORY.layers - 1) / MEMORY.layers
    assert rows["full"].prefill.total - others <= once + 1.25 * MEMORY.layer_bytes


def test_decode_writes_in_place(rows):
    for name in ("full", "headkv"):
        decode = rows[name].decode
        assert decode.results < 0.01 * rows["full"].cache_bytes
        assert decode.arguments + decode.held >= rows[name].cache_bytes


def test_checks_compare_peaks():
    part = memory.Reserved(0, 0, 0)
    size = memory.Size(layers=2)
    layer = size.layer_bytes

    def row(setting, cache, peak):
        return memory.Row(setting, 0, cache, part, None, peak)

    full, none = row("full", 20 * layer, 21 * layer), row("no cache", 0, layer)
    for peak, holds in ((2 * layer, [True, True]), (4 * layer, [False, False])):
        checks = memory.checks([none, full, row("headkv", layer // 2, peak)], size)
        assert [check.holds for check in checks] == holds
    grown = [
        dataclasses.replace(x, resident_growth=x.reserved_peak)
        for x in (none, full, row("headkv", layer // 2, 2 * layer))
    ]
    assert len(memory.checks(grown, size)) == 4


def test_a_process_tells_its_memory():
    assert memory.resident("VmHWM") >= memory.resident("VmRSS") > 0


def test_budgets_of_one_share_hold_as_much():
    for share in (0.05, 0.25):
        even, skewed = (f(ATTENTION, share) for f in (attention.uniform, attention.skewed))
        assert even.sum() == skewed.sum() == round(share * ATTENTION.tokens) * even.size
        assert skewed.max() > even.max() and skewed.min() >= ATTENTION.window


def test_attention_is_timed_against_the_full_cache():
    rows = attention.compare(ATTENTION, "float32", 2, [0.05])
    assert [row.setting for row in rows] == [
        "full",
        "uniform 5%",
        "headkv 5%",
    ]
    full = rows[0]
    assert full.of_full == 1 and full.share == 1
    assert full.live_bytes == 2 * 2 * 256 * 2 * 16 * 4  # k and v, B, S, K, H, fp32
    for row in rows:
        assert np.isclose(row.live_bytes, row.share * full.live_bytes, rtol=0.01)
        assert len(row.all_milliseconds) == ATTENTION.repeats
    goals = attention.goals(rows)
    assert len(goals) == 2 and all(
        goal["holds"] == (goal["got"] <= attention.GOAL) for goal in goals
    )
