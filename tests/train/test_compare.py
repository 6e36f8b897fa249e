"""The comparison: fair arms, rates chosen on a seed of their own, runs that are not taken twice."""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from tuning_toys import packed_batch, tiny_checkpoint

import kvjax
from kvjax.config import GQAConfig, LayerConfig, MLPConfig, ModelConfig, RopeConfig
from train.compare import command as reports
from train.compare import runs
from train.compare.command import check_folder
from train.compare.config import (
    ARMS,
    CompareConfig,
    final_jobs,
    matching,
    read_compare,
    search_jobs,
)
from train.finetune.setup import partition, trainable_paths
from train.finetune.step import flatten

SMALL = {
    "families": ("word_problems",),
    "arms": ("gqa", "mla_svd_global"),
    "rows": 60,
    "problems": 8,
    "steps": 8,
    "batch_size": 2,
    "sequence_length": 64,
    "rates": (1e-3, 1e-2),
    "seeds": 2,
    "eval_every": 4,
    "eval_rows": 8,
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    out = tmp_path_factory.mktemp("compare")
    tiny_checkpoint(out / "model")
    return CompareConfig(model=str(out / "model"), **SMALL), out


def test_every_arm_starts_as_the_same_function():
    model, params = kvjax.load("builtin:needle", dtype="float32")
    tokens = packed_batch(model.config.vocab_size, B=1)["tokens"]
    want = model.apply({"params": params}, tokens)[0]
    trains = {}
    for name, arm in ARMS.items():
        new_model, new_params = arm.convert(model, params)
        got = new_model.apply({"params": new_params}, tokens)[0]
        np.testing.assert_allclose(got, want, atol=3e-4, err_msg=name)
        paths = trainable_paths(new_model, new_params, arm.patterns(model))
        trains[name] = sum(leaf.size for leaf in partition(new_params, paths)[0].values())
        assert len(flatten(new_params)) > len(paths)
    assert trains["gqa_matched"] == trains["mla_svd_global"] == trains["mla_identity"]
    assert trains["gqa"] < trains["mla_svd_per_head"] < trains["gqa_matched"]
    # The down-projections are as many as K and V were.
    assert trains["mla_svd_global_up"] == trains["mla_svd_global"] - trains["gqa"]


def test_a_rate_is_chosen_on_an_order_of_data_that_no_reported_run_has():
    config = CompareConfig()
    searches, finals = search_jobs(config, "gqa"), final_jobs(config, "gqa", config.rates[1])
    assert {job.rate for job in searches} == set(config.rates)
    assert {job.steps for job in searches} == {config.steps // 4}
    assert not {job.seed for job in searches} & {job.seed for job in finals}
    rates = sorted({job.rate for job in finals})
    assert rates == sorted({config.rates[1], 2e-5})
    assert len(finals) == 2 * config.seeds
    assert len({job.name for job in [*searches, *finals]}) == len(searches) + len(finals)


def problems_file(config, out, split):
    return Path(config.sources(split, out / runs.DATA)["word_problems"].path)


def test_problems_of_training_are_no_problems_of_the_tests(small):
    config, out = small
    runs.write_data(config, out)
    rows = {
        name: [
            json.loads(line)["query"]
            for line in problems_file(config, out, name).read_text().splitlines()
        ]
        for name in ("train", "validation")
    }
    asked = [p.query for p in runs.test_problems(config, "word_problems")[: config.problems]]
    assert len(rows["train"]) == 60 and len(rows["validation"]) == 8 and len(asked) == 8
    assert not set(rows["train"]) & set(rows["validation"])
    assert not set(asked) & (set(rows["train"]) | set(rows["validation"]))


def test_runs_and_their_report(small, monkeypatch):
    """A run follows from its job alone, and one that is there is not taken again."""
    config, out = small
    # By default every batch is filled up to 64 problems.
    few = functools.partial(runs.family_accuracy, batch_size=config.problems)
    monkeypatch.setattr(runs, "family_accuracy", few)
    runs.write_data(config, out)
    with jax.numpy_dtype_promotion("standard"):
        for arm in config.arms:
            trainer = runs.trainer(config, out, arm)
            for job in search_jobs(config, arm):
                trainer.run_once(job)
            best = runs.best_rate(config, out, arm)
            for job in final_jobs(config, arm, best):
                trainer.run_once(job)
        first = final_jobs(config, "gqa", runs.best_rate(config, out, "gqa"))[0]
        path = out / "runs" / f"{first.name}.json"
        before = json.loads(path.read_text())
        path.unlink()
        runs.trainer.cache_clear()
        runs.trainer(config, out, "gqa").run_once(first)
        again = json.loads(path.read_text())
        stamp = path.stat().st_mtime_ns
        runs.trainer(config, out, "gqa").run_once(first)
    assert path.stat().st_mtime_ns == stamp
    assert {**before, "seconds": 0} == {**again, "seconds": 0}
    assert before["held_out"][-1][1] < before["held_out"][0][1]
    found = reports.report(config, out, {"word_problems": {"accuracy": 0.25}})
    assert [row["chosen"] for row in found["rows"]] == [True, False] * 2
    finals = final_jobs(config, "gqa", runs.best_rate(config, out, "gqa"))[: config.seeds]
    ends = [runs.read_result(out, job)["held_out"][-1][1] for job in finals]
    table = (out / "table.md").read_text()
    assert table.count("\n") == 2 + 1 + 4 and "0.250" in table
    mean, error = found["rows"][0]["loss_end"]
    assert mean == pytest.approx(np.mean(ends), abs=1e-4)
    assert error == pytest.approx(abs(ends[0] - ends[1]) / 2, abs=1e-4)  # s / √n of two
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_another_comparison_s_folder_is_refused(tmp_path):
    check_folder(CompareConfig(), tmp_path)
    check_folder(CompareConfig(), tmp_path)
    with pytest.raises(ValueError, match="other settings"):
        check_folder(CompareConfig(steps=100), tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(written | {"weights": "0" * 12}))
    with pytest.raises(ValueError, match="other settings"):
        check_folder(CompareConfig(), tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        check_folder(CompareConfig(), tmp_path)


def test_a_finished_comparison_says_so(tmp_path, monkeypatch, capsys):
    check_folder(CompareConfig(), tmp_path)
    for name in reports.REPORT:
        (tmp_path / name).write_text("a table")
    with monkeypatch.context() as patch:
        patch.setattr(reports, "write_data", lambda *_: pytest.fail("it starts again"))
        reports.compare(tmp_path)
    said = capsys.readouterr()
    assert said.err == f"{tmp_path} is finished: nothing is left to do\n"
    assert said.out == "a table\n"
    (tmp_path / reports.PICTURE).unlink()
    monkeypatch.setattr(
        reports, "write_data", lambda *_: (_ for _ in ()).throw(KeyError("goes on"))
    )
    with pytest.raises(KeyError, match="goes on"):
        reports.compare(tmp_path)


def test_rows_of_the_user_take_the_place_of_the_families(small, tmp_path):
    config, _ = small
    rows = [{"query": f"mary {n} ?", "response": "velvet ."} for n in range(40)]
    for name in ("train", "one", "two"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    files = {name: f"plain:{tmp_path}/{name}.jsonl" for name in ("train", "one", "two")}
    changes = {"data": (files["train"],), "held_out": (files["one"], files["two"])}
    changes |= {"arms": ("gqa",), "rates": (1e-2,), "seeds": 1, "paper_rate": None, "steps": 4}
    own = CompareConfig(**{**SMALL, **changes, "model": config.model, "batch_size": 1})
    runs.write_data(own, tmp_path)
    assert not (tmp_path / "data").exists()
    jobs = [*search_jobs(own, "gqa"), *final_jobs(own, "gqa", 1e-2)]
    with jax.numpy_dtype_promotion("standard"):
        for job in jobs:
            runs.trainer(own, tmp_path, "gqa").run_once(job)
    assert len(jobs) == 2
    found = reports.report(own, tmp_path, reports._before(own, tmp_path))
    [row] = found["rows"]
    assert row["loss_of"].keys() == {"one.jsonl", "two.jsonl"} and row["accuracy"] == {}
    assert np.mean([loss for loss, _ in row["loss_of"].values()]) == pytest.approx(
        row["loss_end"][0], abs=1e-3
    )
    first, *_, last = runs.read_result(tmp_path, jobs[1])["held_out"]
    assert last[1] < first[1]
    assert "of one.jsonl" in (tmp_path / "table.md").read_text()
    with pytest.raises(ValueError, match="got only data, expected both data and held_out"):
        CompareConfig(data=(files["train"],))
    with pytest.raises(ValueError, match=r"got a source twice in plain:a\.jsonl, plain:a\.jsonl"):
        CompareConfig(data=("plain:a.jsonl",) * 2, held_out=("plain:b.jsonl",))
    twins = CompareConfig(data=("plain:a/x.jsonl", "plain:b/x.jsonl"), held_out=("plain:c.jsonl",))
    assert [source.path for source in twins.sources("train", tmp_path).values()] == [
        "a/x.jsonl",
        "b/x.jsonl",
    ]


def test_as_many_parameters_as_the_conversion_adds():
    """SmolLM2 has K · H = D / 3: two thirds of a matrix a layer, spread over the layers."""
    attention = GQAConfig(9, 3, 64, 64**-0.5, RopeConfig(64))
    layers = (LayerConfig(attention, MLPConfig(64)),) * 30
    model = kvjax.Transformer(ModelConfig("llama", 100, 576, layers))
    names = matching(model)
    assert len(names) == len(set(names)) == 20 and names[:3] == [
        "layers_0/attn/q",
        "layers_1/attn/o",
        "layers_3/attn/q",
    ]
    assert len(names) * 576 * 576 == 30 * 2 * 192 * 576


def test_bad_settings(tmp_path):
    with pytest.raises(ValueError, match=r"arms\[1\] is 'lora', expected one of gqa"):
        CompareConfig(arms=("gqa", "lora"))
    with pytest.raises(ValueError, match="steps is 3, expected a whole number from 4"):
        CompareConfig(steps=3)
    path = tmp_path / "c.yaml"
    path.write_text("step: 3\n")
    with pytest.raises(ValueError, match="got an unknown field 'step'"):
        read_compare(path)
