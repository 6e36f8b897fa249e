"""Several processes as one run: their start, who writes, loading and saving, a lost peer."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import several
from jax.tree_util import tree_leaves
from tuning_toys import tiny_checkpoint

import kvjax
from kvjax import processes


def test_the_text_of_the_flag(monkeypatch):
    assert processes.parse("10.0.0.1:8476,4,3") == ("10.0.0.1:8476", 4, 3)
    assert processes.parse("[::1]:80,2,0") == ("[::1]:80", 2, 0)
    for text in ("10.0.0.1,4,3", "a:b,2,0", ":80,2,0", "a:80,2", "a:80,2,-1", "a:80,2,0,0", "on"):
        with pytest.raises(ValueError, match=r"expected auto or HOST:PORT,PROCESSES,INDEX"):
            processes.parse(text)
    with pytest.raises(ValueError, match=r"got process 2 of 2 in 'a:80,2,2', expected 0 to 1"):
        processes.parse("a:80,2,2")
    monkeypatch.setenv(processes.VARIABLE, "nonsense")
    with pytest.raises(ValueError, match="KVJAX_DISTRIBUTED 'nonsense'"):
        processes.join()
    with pytest.raises(ValueError, match="'flag'"):  # which wins
        processes.join("flag")


def test_a_port_that_is_taken_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot have port {port}.*expected a free one"):
            processes.join(f"127.0.0.1:{port},2,0")


def test_a_process_that_waits_too_long_for_the_others_says_so():
    start = f"processes.join('127.0.0.1:{several.free_port()},2,1', 1.0)"
    found = subprocess.run(
        [sys.executable, "-c", f"from kvjax import processes; {start}"],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == processes.GONE
    assert "process 1 waited 1 s for all 2 at 127.0.0.1" in found.stderr.splitlines()[-1]


def test_the_flag_is_taken_from_the_arguments():
    assert processes.take_flag(["needle", "--out", "o"]) == (None, ["needle", "--out", "o"])
    assert processes.take_flag(["a", "--distributed", "auto", "b"]) == ("auto", ["a", "b"])
    assert processes.take_flag(["a", "--distributed=x:1,2,0"]) == ("x:1,2,0", ["a"])
    with pytest.raises(ValueError, match="--distributed without a value"):
        processes.take_flag(["a", "--distributed"])


def test_one_process_needs_no_other(monkeypatch):
    monkeypatch.delenv(processes.VARIABLE, raising=False)
    processes.join()
    assert not processes.several() and processes.is_writer()
    processes.barrier("here", 1.0)
    assert processes.on_writer(lambda: 3) == 3 and processes.share([1, 2]) == [1, 2]
    with processes.together():
        pass
    with pytest.raises(ZeroDivisionError), processes.together():
        _ = 1 / 0
    with pytest.raises(SystemExit):
        processes.stop(2)


@pytest.mark.slow
def test_two_processes(tmp_path):
    """See process_worker.py: in the end process 1 is terminated; process 0 says so and stops."""
    _, params = tiny_checkpoint(tmp_path / "gqa")
    with several.started(["process_worker", tmp_path], tmp_path) as (first, second):
        assert several.ended(second, 200) == -signal.SIGTERM, several.lines(tmp_path, 1)
        assert several.ended(first, 60) == processes.GONE, several.lines(tmp_path, 0)
    line = several.lines(tmp_path, 0)[-1]
    assert line.startswith("error: ") and "another process of the run is gone" in line
    assert "the same command" in line
    for layout in ("hf", "native"):
        _, saved = kvjax.load(tmp_path / layout, "float32")
        for x, y in zip(tree_leaves(params), tree_leaves(saved), strict=True):
            np.testing.assert_array_equal(x, y)
