"""The end-to-end decode benchmark at a tiny size."""

import jax.numpy as jnp

from benchmarks.decode_model import SETTINGS, Size, decode, measure, model_config, random_params
from kvjax.cache import ModelCache
from kvjax.nn import Transformer

SIZE = Size(1, 2, 64, 2, hidden=32, heads=4, kv_heads=2, head_dim=16, mlp=32, vocab=16)


def test_every_setting_holds_the_same_entries_and_appends():
    model = Transformer(model_config(SIZE))
    params = random_params(model, "float32")
    for make in SETTINGS.values():
        cache = make(SIZE, "float32")
        held = cache[0].given() if isinstance(cache, ModelCache) else cache[0].lengths
        assert int(held.mean()) == SIZE.context
        after = decode(model, params, jnp.zeros((2, 1), jnp.int32), cache, SIZE.steps)
        assert (after[0].lengths == SIZE.context + SIZE.steps).all()
        assert (after[0].capacity >= after[0].lengths).all()


def test_rows(capsys):
    rows = {row.setting: row for row in measure(SIZE, "float32", repeats=2)}
    assert rows["dense"].of_dense == 1
    assert all(len(row.all_milliseconds) == 2 for row in rows.values())
    entries = 2 * 2 * 2 * 64 * 16 * 4
    for row in rows.values():
        assert entries < row.cache_bytes < 3 * entries
    assert capsys.readouterr().out.count("ms a step") == 3
