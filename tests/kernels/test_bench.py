"""The benchmark at tiny sizes: its arithmetic and its files."""

import json

import numpy as np
import pytest

from pallas_kernels import tables
from pallas_kernels.bench.__main__ import main
from pallas_kernels.bench.cases import GQA, MLA, gqa_case, head_budgets, mla_case, ragged_case
from pallas_kernels.bench.measure import tune, write


def test_live_bytes_and_products():
    N, K, H = GQA["needle"]
    gqa = gqa_case("needle", 2, 64, "bfloat16")
    assert gqa.live_bytes == 2 * 2 * K * 64 * H * 2
    assert gqa.flops == 2 * N * 64 * (2 * H + 2 * H)
    for budgets in ("uniform", "skewed"):
        ragged = ragged_case("needle", 2, 64, "bfloat16", budgets)
        assert ragged.live_bytes == pytest.approx(gqa.live_bytes, rel=0.01)
        assert ragged.flops == gqa.flops
    eight_bits = gqa_case("needle", 2, 64, "int8")
    assert eight_bits.live_bytes == 2 * 2 * K * 64 * (H + 4)
    N, L, R = MLA["llama-3-8b-transmla"]
    mla = mla_case("llama-3-8b-transmla", 1, 16, "float32")
    assert mla.live_bytes == 16 * (L + R) * 4
    assert mla.flops == 16 * N * 2 * (L + R + L)


def test_skewed_budgets_have_the_same_sum():
    skewed = head_budgets(8, 1024, "skewed")
    assert skewed.sum() == head_budgets(8, 1024, "uniform").sum() == 8 * 1024
    assert skewed.max() > 100 * skewed.min() > 0


def test_command(tmp_path, capsys):
    out = tmp_path / "bench.json"
    sizes = ["--models", "needle", "--contexts", "64", "--repeats", "2", "--copy-mib", "1"]
    assert main([*sizes, "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    rows = found["rows"]
    got = {(row["operation"], row["budgets"], row["implementation"]) for row in rows}
    assert got == {
        ("gqa_decode", "", "xla"),
        ("gqa_decode", "", "jax.nn"),
        *(
            ("ragged_gqa_decode", budgets, name)
            for budgets in ("uniform", "skewed")
            for name in ("xla", "dense")
        ),
    }
    for row in rows:
        assert row["median"] == np.median(row["seconds"]) and len(row["seconds"]) == 2
        if row["implementation"] == "xla":
            assert row["times_xla"] == 1
    printed = capsys.readouterr().out
    assert printed.count("× xla") == len(rows)
    assert found["absent"]["jax paged"] == "not on this backend (cpu)"
    assert found["absent"].keys() == {"jax paged", "tokamax"}
    assert "without jax paged: not on this backend (cpu)" in printed


def test_nothing_to_tune_on_a_cpu(capsys):
    assert main(["--tune", "--models", "needle", "--contexts", "64"]) == 2
    assert "nothing to tune on a cpu" in capsys.readouterr().err


def test_tuning_takes_the_fastest_in_sum_and_keeps_the_rest(tmp_path, monkeypatch):
    speeds = {"256": [3.0], "512": [1.0], "1024": [2.0], "2048": [9.0]}
    monkeypatch.setattr("pallas_kernels.bench.measure._runner", lambda *_: None)
    case = gqa_case("needle", 1, 8, "bfloat16")
    found = tune([case, case], "tpu", 1, lambda runs, *_: {name: speeds[name] for name in runs})
    assert found == {"gqa_decode": {"block": 512}}
    path = tmp_path / "tpu.json"
    path.write_text(json.dumps({"default": {}, "TPU v5": {"gqa_decode": {"shares": 2}}}))
    write(path, "TPU v5", found)
    write(path, "TPU v9", found)
    assert json.loads(path.read_text()) == {
        "default": {},
        "TPU v5": {"gqa_decode": {"shares": 2, "block": 512}},
        "TPU v9": found,
    }


def test_tuning_survives_sizes_that_do_not_compile(monkeypatch, capsys):
    """A size must compile for every case of its operation."""
    gqa, mla = gqa_case("needle", 1, 8, "bfloat16"), mla_case("deepseek-v3", 1, 8, "bfloat16")
    longer = gqa._replace(context=9)

    def runner(case, platform, sizes):
        if (case.operation, sizes["block"]) == ("mla_decode", 2048):
            raise NotImplementedError("a piece is too large\nand more")
        if case is longer and sizes["block"] == 512:
            raise RuntimeError("RESOURCE_EXHAUSTED: vmem")

    monkeypatch.setattr("pallas_kernels.bench.measure._runner", runner)
    speeds = {"256": [3.0], "512": [1.0], "1024": [2.0], "2048": [0.5]}
    speeds_of = lambda runs, *_: {name: speeds[name] for name in runs}  # noqa: E731
    assert tune([gqa, mla, longer], "tpu", 1, speeds_of) == {
        "gqa_decode": {"block": 2048},
        "mla_decode": {"block": 512},
    }
    said = capsys.readouterr().err
    assert "mla_decode without block=2048: a piece is too large\n" in said
    assert "gqa_decode without block=512: RESOURCE_EXHAUSTED: vmem\n" in said
    monkeypatch.setattr("pallas_kernels.bench.measure._runner", lambda *_: 1 / 0)
    with pytest.raises(ValueError, match="gqa_decode compiles with no block of"):
        tune([gqa], "tpu", 1, speeds_of)


def test_sizes_in_a_context():
    default = tables.sizes("tpu", "mla_decode", "TPU v6 lite")
    with tables.using(block=128, stages=7):
        assert tables.sizes("tpu", "mla_decode", "TPU v6 lite") == default | {"block": 128}
    assert tables.sizes("tpu", "mla_decode", "TPU v6 lite") == default
