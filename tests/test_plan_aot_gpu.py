"""`kvjax plan` through XLA's compiler for GPUs that are not here: `make test-aot-gpu`."""

from pathlib import Path

import pytest
from cuda import needs_cuda

from kvjax.capacity.plan import Request, plan_capacity

SHAPES = Path(__file__).parents[1] / "benchmarks" / "shapes"
pytestmark = [pytest.mark.aot, needs_cuda]


@pytest.mark.parametrize("mesh", ["tensor=8", "data=2,tensor=4"])
def test_one_sequence_a_group(mesh):
    """What XLA:GPU does to single rows: neither the embedding's table nor a weight is copied."""
    request = Request(str(SHAPES / "llama-3-8b.json"), "h200:8", 32768, 128, mesh=mesh)
    report = plan_capacity(request)
    assert not any("estimated" in note for note in report["notes"])
    assert any("XLA_PYTHON_CLIENT_MEM_FRACTION" in note for note in report["notes"])
    rows = {row["variant"]: row for row in report["rows"]}
    for name, row in rows.items():
        assert row["decode_temporaries"] < 0.1 * rows["full"]["cache"]
        assert sum(row["collectives_outside"].values()) <= 3
        latent = {"all-gather": 1, "all-to-all": 1} if name.startswith("MLA") else {}
        assert row["collectives_layer"] == {"all-reduce": 2, **latent}
