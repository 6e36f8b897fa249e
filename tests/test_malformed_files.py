"""Files that were torn, edited or made to do harm: each is read, or refused by one clear error.

KVJAX_MALFORMED_CASES=20000 draws that many cases in place of 2,000; KVJAX_MALFORMED_REPORT=FILE
then writes how many were refused and the slowest of each kind.
"""

import contextlib
import json
import os
import platform
import signal
import time
import warnings
from collections import Counter
from pathlib import Path

import file_kinds
import pytest
import spoiling
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from eval import results
from kvjax.fields import MOST

CASES = int(os.environ.get("KVJAX_MALFORMED_CASES", 2000))
REPORT = os.environ.get("KVJAX_MALFORMED_REPORT")
HANG = 60
"""Seconds that a case may take."""
NAMES = (
    *(f"config of {name}" for name in ("llama", "qwen3_moe", "gemma3_text", "phi3", "deepseek_v3")),
    *("generation config", "safetensors", "index", "shard", "kvjax.json", "kvjax.json of latents"),
    *("head scores", "packed head scores", "meta of head scores", "need", "context"),
    *("context with a pool", "int4 context", "int4 context with a pool", "conversion"),
    *("record of a command", "GGUF", "settings of a run", "predictions", "results"),
    *("log of training", "finished batches", "suite", "settings of fine-tuning"),
    *("settings of a comparison", "curriculum", "rows", "rows of an array"),
    *("rows packed as .gz", "rows packed as .xz"),
)


@pytest.fixture(scope="module")
def all_kinds(tmp_path_factory):
    return file_kinds.kinds(tmp_path_factory.mktemp("kinds"))


@pytest.fixture(scope="module")
def tally():
    """Counts of the ends of all cases, and the slowest case of each kind."""
    found: dict = {"ends": Counter(), "slowest": {}, "commit": results.commit()}
    yield found
    if REPORT:
        order = sorted(found["slowest"].items(), key=lambda item: -item[1]["seconds"])
        about = {
            "command": f"KVJAX_MALFORMED_CASES={CASES} pytest tests/test_malformed_files.py",
            "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
            "commit": found["commit"],
            "cases": sum(found["ends"].values()),
        }
        content = {**about, **found["ends"], "slowest": dict(order)}
        Path(REPORT).write_text(json.dumps(content, indent=1) + "\n")


@contextlib.contextmanager
def no_longer_than(seconds):
    def hangs(number, frame):
        raise AssertionError(f"reading takes longer than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def end_of(kind, folder):
    """How reading ends: "read" or "refused"; an error of another kind is a failure."""
    try:
        kind.read(folder)
    except (ValueError, NotImplementedError) as error:
        lines = str(error).splitlines()
        assert 1 <= len(lines) <= MOST + 1
        assert max(map(len, lines)) < 1500
        assert all(str(folder) in line or line.startswith("and ") for line in lines)
        return "refused"
    return "read"


@pytest.mark.parametrize("name", NAMES)
def test_a_spoilt_file_is_read_or_refused_by_name(tmp_path, all_kinds, tally, name):
    kind = all_kinds[name]
    others = sorted(other.files[other.spoilt] for other in all_kinds.values())
    for file, data in kind.files.items():
        (tmp_path / file).write_bytes(data)
    assert end_of(kind, tmp_path) == "read"

    @settings(
        max_examples=-(-CASES // len(NAMES)),
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def case(data):
        spoilt = spoiling.spoilt(data.draw, kind, others)
        (tmp_path / kind.spoilt).write_bytes(spoilt)
        before, start = content(tmp_path), time.perf_counter()
        with no_longer_than(HANG), warnings.catch_warnings(action="error"):
            end = end_of(kind, tmp_path)
        seconds = time.perf_counter() - start
        tally["ends"][end] += 1
        if seconds > tally["slowest"].get(name, {}).get("seconds", 0):
            tally["slowest"][name] = {"seconds": round(seconds, 3), "bytes": len(spoilt)}
        after = content(tmp_path)
        if kind.repairs:  # a torn last line is cut off; a file without whole lines is a new one
            whole = spoilt[: spoilt.rfind(b"\n") + 1]
            assert after[kind.spoilt] in (spoilt, whole) or (end == "read" and not whole)
            after[kind.spoilt] = spoilt
        assert after == before

    case()


def test_every_kind_is_drawn(all_kinds):
    assert set(all_kinds) == set(NAMES)
