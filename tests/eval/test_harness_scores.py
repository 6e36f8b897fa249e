"""The mean over lm-evaluation-harness's tasks, on results of the shape that 0.4.13 gives."""

import pytest

from eval.harness_scores import scores

SIX = ("arc_easy", "arc_challenge", "piqa", "hellaswag", "openbookqa", "winogrande")
BRANCHES = {
    name: [f"mmlu_{name}_{n}" for n in range(count)]
    for name, count in {"stem": 19, "other": 13, "social_sciences": 12, "humanities": 13}.items()
}


def leaf(name, metrics, count=10, error=0.1):
    numbers = {f"{metric},none": value for metric, value in metrics.items()}
    errors = {f"{metric}_stderr,none": error for metric in metrics}
    return {"name": name, "alias": name, "sample_len": count, **numbers, **errors}


def results(leaves, groups=(), members=(), low=()):
    """Groups without an aggregate have nothing but their names, and no group has n-samples."""
    entries = {name: leaf(name, metrics, *rest) for name, (metrics, *rest) in leaves.items()}
    high = {
        name: {metric: metric not in low for metric in metrics}
        for name, (metrics, *_) in leaves.items()
    }
    counts = {n: {"original": 99, "effective": e["sample_len"]} for n, e in entries.items()}
    for name, entry in dict(groups).items():
        entries[name] = {"alias": f" - {name}", "name": name, **entry}
    return {
        "results": entries,
        "group_subtasks": dict(members),
        "higher_is_better": high,
        "n-samples": counts,
    }


def aggregate(value, count, error=0.01):
    return {
        "sample_len": count,
        "acc,none": value,
        "acc_stderr,none": error,
        "sample_count": {"acc,none": count},
    }


def zero_shot():
    """MMLU with its branches and 57 subjects, and six tasks."""
    subjects = [subject for branch in BRANCHES.values() for subject in branch]
    leaves = {name: ({"acc": 0.25}, 10) for name in subjects}
    leaves |= {name: ({"acc": 0.6, "acc_norm": 0.75}, 20, 0.02) for name in SIX}
    groups = {"mmlu": aggregate(0.25, 570)}
    groups |= {f"mmlu_{name}": aggregate(0.25, 10 * len(subs)) for name, subs in BRANCHES.items()}
    members = {"mmlu": [f"mmlu_{name}" for name in BRANCHES]}
    members |= {f"mmlu_{name}": subs for name, subs in BRANCHES.items()}
    return results(leaves, groups, members)


@pytest.mark.parametrize("requested", [None, ["mmlu", *SIX], {"mmlu": [], **dict.fromkeys(SIX)}])
def test_a_group_counts_once(requested):
    found = scores(zero_shot(), requested)
    assert found["all"]["score"] == pytest.approx((0.25 + 6 * 0.75) / 7)  # .679, not .298
    assert found["all"]["standard_error"] == pytest.approx((6 * 0.02**2 + 0.01**2) ** 0.5 / 7)
    assert found["all"]["items"] == 570 + 6 * 20
    assert set(found["groups"]) == {"mmlu (acc)", *(f"{name} (acc_norm)" for name in SIX)}
    mmlu = found["groups"]["mmlu (acc)"]
    assert mmlu == {"score": 0.25, "standard_error": 0.01, "items": 570}
    numbers = found["summary"]
    assert numbers["mmlu_stem acc"] == numbers["mmlu_stem_0 acc"] == 0.25
    assert numbers["piqa acc"] == 0.6 and "not in the mean" not in numbers
    assert not any("sample_len" in name for name in numbers)


def test_a_group_s_aggregate_is_the_harness_s_own():
    """By documents here, .7, where the plain mean of the tasks is .5."""
    leaves = {"small": ({"acc": 0.2}, 20), "large": ({"acc": 0.8}, 100)}
    found = scores(results(leaves, {"both": aggregate(0.7, 120)}, {"both": ["small", "large"]}))
    assert found["groups"] == {"both (acc)": {"score": 0.7, "standard_error": 0.01, "items": 120}}
    assert found["all"]["score"] == 0.7


def test_a_group_without_an_aggregate_is_the_mean_of_its_members():
    """A group among them counts once in it, too."""
    leaves = {
        "a": ({"acc": 0.2},),
        "b": ({"acc": 0.4},),
        "c": ({"acc": 0.9},),
        "d": ({"acc": 1.0},),
    }
    members = {"outer": ["inner", "c"], "inner": ["a", "b"]}
    found = scores(results(leaves, {"outer": {}, "inner": {}}, members))
    assert set(found["groups"]) == {"outer (acc, mean of 2)", "d (acc)"}
    outer = found["groups"]["outer (acc, mean of 2)"]
    assert outer["score"] == pytest.approx((0.3 + 0.9) / 2) and outer["items"] == 30
    inner = (2 * 0.1**2) ** 0.5 / 2
    assert outer["standard_error"] == pytest.approx((inner**2 + 0.1**2) ** 0.5 / 2)
    assert found["all"]["score"] == pytest.approx(0.8) and found["all"]["items"] == 40


def test_a_tag_counts_once():
    """The results do not name it: its tasks stand among the others."""
    leaves = {
        n: ({"acc": v},) for n, v in {"arc_easy": 0.8, "arc_challenge": 0.4, "piqa": 0.9}.items()
    }
    requested = {"ai2_arc": ["arc_challenge", "arc_easy"], "piqa": []}
    found = scores(results(leaves), requested)
    assert found["groups"]["ai2_arc (acc, mean of 2)"]["score"] == pytest.approx(0.6)
    assert found["all"]["score"] == pytest.approx(0.75) and found["all"]["items"] == 30


def test_scores_that_are_better_low_are_not_averaged_with_accuracies():
    leaves = {"wikitext": ({"word_perplexity": 12.0},), "piqa": ({"acc": 0.8},)}
    leaves |= {"wmt": ({"bleu": 31.0},), "crows": ({"pct_stereotype": 0.6},)}
    found = scores(results(leaves, low=("word_perplexity", "pct_stereotype")))
    assert found["all"]["score"] == 0.8 and found["all"]["items"] == 10
    assert found["groups"]["wikitext (word_perplexity)"]["score"] == 12.0
    said = found["summary"]["not in the mean"]
    assert said == "wikitext (word_perplexity), wmt (bleu), crows (pct_stereotype)"
    said_nothing = results(leaves) | {"higher_is_better": {}}
    assert scores(said_nothing, ["piqa", "wikitext"])["all"]["score"] == 0.8


def test_perplexities_alone_have_a_mean():
    leaves = {"a": ({"word_perplexity": 10.0},), "b": ({"word_perplexity": 14.0},)}
    found = scores(results(leaves, low=("word_perplexity",)))
    assert found["all"]["score"] == 12.0 and found["all"]["items"] == 20


def test_filters_and_missing_errors():
    entry = {
        "sample_len": 7,  # is no metric
        "exact_match,strict-match": 0.25,
        "exact_match_stderr,strict-match": "N/A",
        "exact_match,flexible-extract": 0.75,
        "exact_match_stderr,flexible-extract": 0.1,
    }
    made = results({"gsm8k": ({},)})
    made["results"]["gsm8k"] |= entry
    found = scores(made)
    [(label, part)] = found["groups"].items()
    assert label == "gsm8k (exact_match,strict-match)"
    assert part == {"score": 0.25, "standard_error": None, "items": 10}
    assert found["summary"]["gsm8k exact_match,flexible-extract"] == 0.75


def test_names_without_a_score_are_named():
    leaves = {"a": ({"acc": 0.5},), "broken": ({"acc": float("nan")},)}
    found = scores(results(leaves))
    assert found["all"]["score"] == 0.5
    assert found["summary"]["not in the mean"] == "broken (no score)"
    with pytest.raises(ValueError, match="gave no scores"):
        scores(results({"broken": ({"acc": float("nan")},)}))
