"""`benchmarks.frontier`: what its rows mean, and which of them lose to smaller numbers."""

import json

import pytest

from benchmarks.frontier import FORMS, policies_of
from benchmarks.frontier_report import report, series, table
from kvjax.policies import parse_policy
from kvjax.policies.policy import Policy

N = 40


def line(form, kind, start, judged, sizes):
    tokens = [100] * len(next(iter(judged.values())))
    held = {label: [100 * size] * len(tokens) for label, size in sizes.items()}
    facts = {"date": "today", "processor": "one", "versions": {}, "command": "c", "commit": "abc"}
    row = {"form": form, "kind": kind, "start": start, "tokens": tokens, "judged": judged}
    return {**row, "bytes": held, "cpu_seconds": 1.0, **facts}


@pytest.fixture
def lines():
    sizes = {"full": 80, "full + int4": 24, "headkv 0.4": 32, "headkv 0.1": 8, "snapkv 0.4": 32}
    right = {"full": "1" * N, "full + int4": "1" * (N - 1) + "0", "headkv 0.4": "1" * N}
    right |= {"headkv 0.1": "10" * (N // 2), "snapkv 0.4": "1000" * (N // 4)}
    nats = {
        label: [3.0 + 0.01 * i + (label == "snapkv 0.4") * 0.2 for i in range(8)] for label in sizes
    }
    later = line("50 %", "prompts", 0, {"full": "11" * (N // 2)}, {"full": 40})
    return [
        line("original", "prompts", 0, right, sizes),
        line("original", "text", 0, nats, sizes),
        later,
    ]  # fmt: skip


def test_rows_count_bytes_and_paired_changes(lines):
    rows = {row["name"]: row for row in table(lines)}
    assert [row["bytes"] for row in table(lines)] == [80, 40, 32, 32, 24, 8]
    full, few = rows["original, full"], rows["original, headkv 0.1"]
    assert (full["share"], full["right"], full["right_change"]) == (1.0, 1.0, 0.0)
    assert (few["share"], few["right"], few["right_change"]) == (0.1, 0.5, -0.5)
    assert few["right_error"] == pytest.approx((0.25 * N / (N - 1)) ** 0.5 / N**0.5, abs=1e-4)
    assert few["prompts"] == N and few["texts"] == 8 and few["nats_change"] == 0.0
    assert "perplexity" not in rows["50 %, full"]  # no text was read yet


def test_what_loses_to_smaller_numbers_is_said(lines):
    losers = {row["name"]: row["loses_to"] for row in table(lines)}
    # SnapKV has more bytes than int4 and fewer right answers; headkv has as many.
    assert losers["original, snapkv 0.4"] == ["original, full + int4"]
    assert losers["original, headkv 0.4"] == losers["original, headkv 0.1"] == []


def test_every_policy_is_one():
    for form in FORMS:
        named = policies_of(form)
        assert "full" in named and len(named) == len(set(named.values()))
        assert all(isinstance(parse_policy(policy), Policy) for policy in named.values())


def test_the_report_is_written(lines, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "frontier.json"
    settings = {"model": "m", "tasks": ["number"], "judged": 256, "prefix": 1024}
    text = "".join(json.dumps(value) + "\n" for value in (settings, *lines))
    out.with_suffix(".jsonl").write_text(text)
    report(out, tmp_path / "picture.png")
    assert len(json.loads(out.read_text())["rows"]) == 6
    assert "| original, snapkv 0.4 | 32 | 40.0% |" in out.with_suffix(".md").read_text()
    assert (tmp_path / "picture.png").stat().st_size > 1000
    names = set(series(json.loads(out.read_text())["rows"]))
    assert names == {"smaller numbers", "decoupled", "headkv", "snapkv"}
