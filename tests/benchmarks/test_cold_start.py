"""The calls of `benchmarks.cold_start` change what they say, and nothing leaves its bucket."""

import json

import pytest

from benchmarks import cold_start
from benchmarks.cold_start_process import FIRST, changes, names_of
from benchmarks.compile_spans import Span
from kvjax.policies.named import parse_policy
from kvjax.prefilling import bucket_length


@pytest.mark.parametrize("policy", cold_start.POLICIES)
def test_each_call_changes_one_thing(policy):
    found = changes(policy, only_first=False)
    first = FIRST | {"policy": policy}
    changed = {
        name: {key for key in first if settings[key] != first[key]}
        for name, settings in found.items()
    }
    assert changed.pop("other KV size", {"policy"}) == {"policy"}
    assert changed == {
        "first": set(),
        "second": set(),
        "other policy": {"policy"},
        "other max_new_tokens": {"max_new_tokens"},
        "other prompt length": {"prompt"},
    }
    assert {bucket_length(settings["prompt"]) for settings in found.values()} == {1024}
    assert list(changes(policy, only_first=True)) == ["first", "second"]


@pytest.mark.parametrize("policy", cold_start.POLICIES[1:])
def test_the_other_policy_has_the_same_scorer(policy):
    found = changes(policy, only_first=False)
    scorers = [parse_policy(found[name]["policy"]).scorer for name in ("first", "other policy")]
    assert scorers[0] == scorers[1]


def test_programs_are_named_by_their_cost():
    spans = [Span("compile", "a", 1.0), Span("compile", "b", 3.0), Span("trace", "c", 9.0)]
    found = names_of("compile", [*spans, Span("compile", "a", 1.0)])
    assert list(found.items()) == [("b", 1), ("a", 2)]


def test_rows_are_measured_again_on_another_commit_and_where_calls_are_missing(tmp_path):
    path, row = tmp_path / "rows.json", {"kind": "llama", "layers": 6, "policy": "full"}
    row["empty_cache"] = {"calls": ["first", "second"]}
    assert cold_start.kept_rows(path, "abc", True) == {}
    path.write_text(json.dumps({"commit": "abc", "rows": [row]}))
    assert cold_start.kept_rows(path, "abc", True) == {"llama, 6 layers, full": row}
    assert cold_start.kept_rows(path, "abc", False) == {}
    assert cold_start.kept_rows(path, "def", True) == {}
    row["empty_cache"]["calls"].append("other policy")
    path.write_text(json.dumps({"commit": "abc", "rows": [row]}))
    assert cold_start.kept_rows(path, "abc", False) == {"llama, 6 layers, full": row}
