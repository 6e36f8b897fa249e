"""`kvjax plan` through the TPU compiler: `make test-aot`."""

import os
import re
from pathlib import Path

import pytest

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
pytest.importorskip("libtpu", reason="needs libtpu: make test-aot")

from kvjax.capacity.devices import Topology
from kvjax.capacity.plan import Request, plan_capacity
from kvjax.capacity.programs import lower_step
from kvjax.capacity.variants import Served, Workload
from kvjax.hf import read_shape
from kvjax.mesh import make_mesh
from kvjax.policies.named import parse_policy

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
    assert 0 < report["check"]["collectives"]["all-reduce"] - 2 * layers <= 2


@pytest.mark.parametrize("topology", ["v5e:2x4", "v5p:2x2x2", "v6e:2x4"])
def test_work_lists_are_made_once_a_step(topology):
    """Llama-3-8B's step as one program: 32 kernels, and one list of all layers' pieces."""
    model = read_shape(str(SHAPES / "llama-3-8b.json"))
    mesh = make_mesh({"tensor": 8}, Topology.parse(topology).devices())
    policy, size = parse_policy("snapkv:kv_size=512"), Workload(2, 32768, 128)
    text = lower_step(Served.create(model, policy, size, mesh, "bfloat16")).compile().as_text()
    assert len(re.findall(r'custom_call_target="tpu_custom_call"', text)) == 32
    # Where pieces begin is a running sum over [layers, segments], and whose they are a search.
    sums = re.findall(r"= s32\[(\d+),\d+\]\S* reduce-window\(", text)
    assert sums == ["32"]
    searches = re.findall(r'op_name="([^"]*searchsorted[^"]*)"', text)
    assert searches and not any("apply_block" in name for name in searches)
