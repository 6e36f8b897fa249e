"""`kvjax plan` through the TPU compiler: `make test-aot`."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
pytest.importorskip("libtpu", reason="needs libtpu: make test-aot")

from kvjax.pipelines.plan import Request, plan_capacity

pytestmark = pytest.mark.aot

SHAPES = Path(__file__).parents[1] / "benchmarks" / "shapes"


@pytest.mark.parametrize("model, topology", [("qwen2.5-7b", "v5e:4x4"), ("llama-3-8b", "v6e:4x4")])
def test_decode_is_small_and_talks_little(model, topology):
    request = Request(str(SHAPES / f"{model}.json"), topology, context=32768, new_tokens=128)
    report = plan_capacity(request, check=True)
    assert not any("estimated" in note for note in report["notes"])
    rows = {row["variant"]: row for row in report["rows"]}
    assert len(rows) == 4
    heads = [row for name, row in rows.items() if not name.startswith("MLA")]
    assert all(row["collectives_layer"] == {"all-reduce": 2} for row in heads)
    assert all(sum(row["collectives_outside"].values()) <= 3 for row in rows.values())
    latent = rows["MLA 512 + 128"]["collectives_layer"]
    assert latent == {"all-reduce": 2, "all-gather": 1, "all-to-all": 1}
    groups = rows["full"]["batch"] / report["batch"]
    for row in rows.values():
        assert row["decode_temporaries"] < 0.1 * rows["full"]["cache"]
        temporaries = row["decode_temporaries"] + groups * row["decode_temporaries_more"]
        assert temporaries < 0.01 * rows["full"]["cache"] * groups
        assert row["fits"]
    assert report["check"]["relative_error"] < 0.02
    layers = {"qwen2.5-7b": 28, "llama-3-8b": 32}[model]
    assert report["check"]["collectives"]["all-reduce"] == 2 * layers + 1
