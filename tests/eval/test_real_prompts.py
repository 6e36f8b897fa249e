"""Real prompts on a real checkpoint, from the command to the report of bytes and cuts.

The scores of a model of 260 thousand parameters mean nothing; what is checked is everything else.
"""

import json

import numpy as np
import pytest

import kvjax
from eval.__main__ import main

pytestmark = pytest.mark.data

RUNS = {
    "longbench": ("longbench", "--subsets", "multi_news"),
    "babilong": ("babilong", "--lengths", "0", "1000", "2000", "4000", "--subsets", "qa1"),
    "longchat": ("longchat",),
    "loogle": ("loogle", "--subsets", "longdep_qa"),
    "ruler": ("ruler",),
}
# A limit counts the documents of loogle, each with several questions, and the items of a length.
LIMITS = {"loogle": "1", "babilong": "2"}


@pytest.mark.parametrize("name", RUNS)
def test_end_to_end(name, data_dir, tmp_path):
    checkpoint = data_dir / "checkpoints" / "stories260k"
    command = [*RUNS[name], "--model", str(checkpoint), "--dtype", "float32"]
    command += ["--limit", LIMITS.get(name, "5")]
    command += ["--data-dir", str(data_dir), "--out", str(tmp_path), "--max-new-tokens", "4"]
    command += ["--policy", "full", "--policy", "snapkv:kv_size=32", "--batch-size", "5"]
    if name == "ruler":
        with pytest.raises(SystemExit):  # a cut prompt may lack its answer: not unasked
            main(command)
        command += ["--truncate", "middle"]
    main(command)
    found = json.loads((tmp_path / "results.json").read_text())
    lines = [json.loads(t) for t in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * found["items"] and found["items"] >= 5
    full, small = found["policies"]
    config = kvjax.hf.read_model(checkpoint).config
    layers, heads, width = config.num_layers, 4, 8
    assert full["cache_bytes"] == full["full_cache_bytes"] == full["gqa_cache_bytes"]
    assert small["cache_bytes"] < 0.6 * full["cache_bytes"]
    most = full["prompt_tokens"]["most"]
    assert most <= 512 - 4
    if name != "babilong":  # all prompts are cut, to one length
        # Keys and values of 512 tokens or more, fp32; each layer's length, and one for RoPE.
        rows = (full["cache_bytes"] - 4 * (layers + 1)) / (layers * heads * 2 * width * 4)
        assert rows.is_integer() and rows >= 512
        assert full["truncated"] == found["items"] and most == 508
    else:
        assert 0 < full["truncated"] < found["items"]
    assert all(0 <= line["score"] <= 1 for line in lines)
    assert np.isfinite(full["all"]["score"])
