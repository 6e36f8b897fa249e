"""Commands that are killed or whose disk is full, as `python -m benchmarks.faults` does it."""

import pytest

from benchmarks import faults


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    bench = faults.Bench(tmp_path_factory.mktemp("faults"))
    bench.inputs.mkdir()
    (bench.inputs / "text.txt").write_text("the red fox runs . " * 30)
    return bench


@pytest.mark.parametrize(("name", "fault"), [("compress", "kill"), ("save", "full disk")])
def test_nothing_good_is_lost_and_the_same_command_finishes(bench, name, fault):
    rows = [bench.fault(name, fault, number) for number in range(2)]
    assert all(row["good"] for row in rows), rows


def test_what_counts_as_lost():
    old, new = {"a": "1"}, {"a": "2", "b": "3"}
    assert faults.lost({"a": "1"}, old, new) == faults.lost({"a": "2", "b": "3"}, old, new) == []
    left = {"a": "1", "c.part": "9", "x.kvjax-part/b": "9", "log.jsonl": "9", "a.lock": "9"}
    assert faults.lost(left, old, new) == []
    assert faults.lost({"a": "9", "b": "9"}, old, new) == ["a", "b"]
    assert faults.lost({}, old, new) == ["a"]


def test_every_command_has_faults_of_both_kinds():
    drawn = list(faults.faults(kills=20, disks=10))
    assert len(drawn) == len(set(drawn)) == 30 * len(faults.COMMANDS)
