"""The table of GSM8K and HumanEval with smaller caches."""

import json

import pytest

from benchmarks.coder_tasks_report import report, sign_test


def test_the_sign_test():
    assert sign_test(0, 0) == sign_test(3, 3) == 1
    assert sign_test(0, 5) == sign_test(5, 0) == pytest.approx(2 / 32)
    assert sign_test(1, 7) == pytest.approx(2 * 9 / 256)


def line(form, policy, scores, held):
    return {
        "task": "gsm8k",
        "form": form,
        "policy": policy,
        "scores": dict(enumerate(scores)),
        "texts": {number: f"{score}" for number, score in enumerate(scores)},
        "cache_bytes": held,
        "full_cache_bytes": 100,
        **dict.fromkeys(("date", "processor", "cores", "versions", "command"), ""),
        "commit": form[:3],
    }


def test_rows_are_compared_item_by_item(tmp_path):
    lines = [line("original", "full", [1, 1, 0, 0], 100), line("50 %", "full", [0, 1, 1, 0], 50)]
    out = tmp_path / "tasks.json"
    out.with_suffix(".jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    report(out)
    half = json.loads(out.read_text())["rows"][1]
    assert (half["lost"], half["won"], half["same_text"]) == (1, 1, 2)
    assert (half["score"], half["change"], half["share"]) == (0.5, 0, 0.5)
    assert "| 50 % | full | 50 % | 50 ± 29 % of 4 |" in out.with_suffix(".md").read_text()
