"""Commands that are killed or whose disk is full, as `python -m benchmarks.faults` does it."""

import dataclasses
import os
import re

import pytest

from benchmarks import faults
from benchmarks.disturbed import Disturbance
from benchmarks.left import lost

FULL = re.compile("error: (.Errno 27. File too large|cannot write (a checkpoint to )?OUT)")
"""What a command says of a full disk."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    # Tracing the fits takes each process seconds; tests/transmla stops and resumes them.
    convert = faults.COMMANDS["convert"]
    convert = dataclasses.replace(convert, words=f"{convert.words} --recipe published")
    flags = re.sub(r"device_count=\d+", "device_count=1", os.environ["XLA_FLAGS"])
    commands = {**faults.COMMANDS, "convert": convert}
    return faults.Bench(tmp_path_factory.mktemp("faults") / "work", commands, XLA_FLAGS=flags)


@pytest.mark.parametrize("name", faults.COMMANDS)
def test_after_full_disks_and_kills_the_same_command_finishes(bench, name):
    """One fault after the other in the same folder, each on what the one before left."""
    whole, out = bench.whole(name), bench.older(name, "disturbed")
    disks = [Disturbance(file_bytes=size) for size in (whole.largest // 2, faults.LEAST)]
    # Early ones: a run that goes on from what the one before left changes less.
    kills = [Disturbance(change=1 + whole.changes // part) for part in (4, 8)]
    both = zip(disks, kills, strict=True)
    rows = [bench.disturb(name, out, disturbance) for pair in both for disturbance in pair]
    assert [row["exit"] for row in rows] == [2, -9, 2, -9], rows
    assert not any(row["lost"] or row["traceback"] for row in rows), rows
    assert all(FULL.search(row["last line"]) for row in rows[::2]), rows
    assert bench.same(name, out)


def test_what_counts_as_lost():
    old, new = {"a": "1"}, {"a": "2", "b": "3"}
    assert lost({"a": "1"}, old, new) == lost({"a": "2", "b": "3"}, old, new) == []
    left = {"a": "1", "c.part": "9", "x.kvjax-part/b": "9", "log.jsonl": "9", "a.lock": "9"}
    assert lost(left, old, new) == []
    assert lost({"a": "9", "b": "9"}, old, new) == ["a", "b"]
    assert lost({}, old, new) == ["a"]


def test_every_command_has_faults_of_both_kinds():
    drawn = list(faults.faults(kills=20, disks=10))
    assert len(drawn) == len(set(drawn)) == 30 * len(faults.COMMANDS)
