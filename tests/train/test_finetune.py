"""Runs: exact resume, kill -9, errors that name the step, the merged model, the command."""

import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tuning_toys import tiny_checkpoint

import kvjax
from kvjax import transmla
from kvjax.hf.source import copy_companions
from kvjax.tasks.families import rows
from train import checkpoints, log
from train.__main__ import main, parse
from train.checkpoints import Checkpoints
from train.finetune.config import TuneConfig, parse_source, read_config
from train.finetune.run import finetune, steps_and_data
from train.finetune.setup import load, trainable_paths
from train.finetune.step import flatten

QUICK = {
    "sequence_length": 64,
    "batch_size": 4,
    "learning_rate": 3e-3,
    "dtype": "float32",
    "log_every": 2,
    "checkpoint_every": 4,
    "steps": 12,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with the project's vocabulary, its conversion, and rows to train on."""
    out = tmp_path_factory.mktemp("tune")
    model, params = tiny_checkpoint(out / "gqa")
    kvjax.save(*transmla.convert(model, params), out / "mla")
    copy_companions(out / "gqa", out / "mla")
    lines = [json.dumps(row) + "\n" for row in rows("word_problems", 120, 0)]
    (out / "rows.jsonl").write_text("".join(lines))
    return out


def settings(folder, **changes):
    data = (f"plain:{folder / 'rows.jsonl'}",)
    return TuneConfig(**{"model": str(folder / "mla"), "data": data, **QUICK, **changes})


def run(config, out, stop_after=None):
    with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):  # for orbax
        warnings.simplefilter("ignore")
        return finetune(config, out, stop_after)


def newest(config, out):
    with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):
        warnings.simplefilter("ignore")
        return Checkpoints(out, 2).load_newest(load(config)[1])


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    report = run(settings(folder, merge=True), out)
    return out, report


def same_run(config, one, other):
    (a_step, a, a_data), (b_step, b, b_data) = newest(config, one), newest(config, other)
    assert a_step == b_step and a_data == b_data
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
    timed = ("seconds", "tokens_per_second")
    logs = [
        [
            {k: v for k, v in line.items() if k not in timed}
            for line in log.read(out / "metrics.jsonl")
        ]
        for out in (one, other)
    ]
    assert logs[0] == logs[1]


def test_a_run(folder, finished):
    out, report = finished
    lines = log.read(out / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert report["steps"] == report["of"] == 12
    assert report["learned_tokens"] < report["tokens"] <= 12 * 4 * 64
    model, params = kvjax.load(folder / "mla", dtype="float32")
    paths = trainable_paths(model, params, ["kv_only"])
    assert report["trainable"] == sum(flatten(params)[path].size for path in paths)
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    steps = [int(path.name) for path in (out / checkpoints.FOLDER).iterdir()]
    assert sorted(steps) == [8, 12]


def test_merge_is_the_trained_model_and_frozen_weights_are_untouched(folder, finished):
    out, _ = finished
    config = settings(folder)
    model, merged = kvjax.load(out / "model", dtype="float32")
    _, source = kvjax.load(folder / "mla", dtype="float32")
    _, state, _ = newest(config, out)
    for path, leaf in flatten(merged).items():
        if path in state.params:
            np.testing.assert_array_equal(leaf, state.params[path])
            assert not np.array_equal(leaf, flatten(source)[path])
        else:
            np.testing.assert_array_equal(leaf, flatten(source)[path])
    ids = kvjax.load_tokenizer(out / "model")("mary is 14 years old").input_ids
    assert model.apply({"params": merged}, jnp.asarray([ids], jnp.int32))[0].shape[1] == len(ids)


@pytest.mark.parametrize("stop", [3, 6])
def test_stopped_and_resumed_it_is_the_same_run(folder, finished, tmp_path, stop):
    config = settings(folder)
    run(config, tmp_path, stop_after=stop)
    assert log.read(tmp_path / "metrics.jsonl")[-1]["step"] <= stop
    run(config, tmp_path)
    same_run(config, finished[0], tmp_path)


def test_another_run_s_folder_is_refused(folder, finished):
    with pytest.raises(ValueError, match=r"other settings \(learning_rate 0.003, now 0.1"):
        run(settings(folder, learning_rate=0.1), finished[0])


@pytest.mark.parametrize("text", ["[1]", "{", "[" * 100_000])
def test_a_folder_with_a_damaged_config_is_refused(folder, tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json(, line 1)? (is not JSON|holds a list)"):
        run(settings(folder), tmp_path)


def test_a_run_goes_on_from_the_weights_that_it_began_with(folder, finished, tmp_path):
    """The model's folder may hold another model by then: checkpoints have what trains alone."""
    shutil.copytree(finished[0], tmp_path / "run")
    model, params = kvjax.load(folder / "mla", dtype="float32")
    tuned = params | {"embedding": params["embedding"].at[0, 0].add(1e-3)}
    kvjax.save(model, tuned, tmp_path / "mla")
    for file in (folder / "mla").glob("*token*"):
        shutil.copy(file, tmp_path / "mla")
    config = settings(folder, model=str(tmp_path / "mla"), merge=True)
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    path = tmp_path / "run" / "config.json"
    path.write_text(json.dumps(written | {"model": config.model}))
    with pytest.raises(
        ValueError, match=r"began with other weights .*\(weights \w{12}, now \w{12}"
    ):
        run(config, tmp_path / "run")
    path.write_text(json.dumps(written))
    assert run(settings(folder), tmp_path / "run")["steps"] == 12


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(folder, tmp_path):
    config = settings(folder, learning_rate=1e30, warmup=0.5, checkpoint_every=1, clip=1e30)
    with pytest.raises(
        ValueError, match=r"step (\d+): loss .*last good checkpoint is of step"
    ) as e:
        run(config, tmp_path)
    step = int(str(e.value).split("step ")[1].split(":")[0])
    kept = int(str(e.value).rsplit(" ", 1)[1])
    assert kept == step - 1
    number, state, _ = newest(config, tmp_path)
    assert number == kept
    assert all(np.isfinite(leaf).all() for leaf in state.params.values())


# Orbax reads many arrays at once: some end when the first error has closed the loop of events.
STRAY = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@STRAY
@pytest.mark.parametrize("damaged", ["manifest.ocdbt", "*METADATA", "?" * 32])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    folder, finished, tmp_path, capsys, damaged
):
    out, config = tmp_path / "run", settings(folder)
    shutil.copytree(finished[0], out)
    last, aside = out / "checkpoints" / "12", out / "damaged" / "12"
    torn = [path for path in last.rglob(damaged) if path.is_file()]
    assert torn
    for path in torn:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    run(config, out)
    moved = f"{last} is damaged, moved to {aside}"
    assert capsys.readouterr().err.startswith(f"{moved}: the run continues from step 8\n")
    same_run(config, finished[0], out)


@STRAY
def test_the_only_checkpoint_is_named_if_it_is_damaged(folder, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / "8")
    for path in (tmp_path / "checkpoints" / "12").rglob("manifest.ocdbt"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="12 is a damaged checkpoint: "):
        run(settings(folder), tmp_path)


def test_a_mistyped_path_does_not_claim_the_folder(folder, tmp_path):
    for wrong in ({"data": ("plain:nowhere.jsonl",)}, {"model": "nowhere"}):
        with pytest.raises(ValueError, match="nowhere"):
            run(settings(folder, **wrong), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_finished_run_says_so_and_writes_a_missing_model(folder, finished, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    report = run(settings(folder, merge=True), out)
    assert capsys.readouterr().err == f"{out} is finished: nothing is left to do\n"
    shutil.rmtree(out / "model")
    assert run(settings(folder, merge=True), out)["model"] == report["model"]
    assert "finished" not in capsys.readouterr().err
    kept = [{p.name for p in (place / "model").iterdir()} for place in (finished[0], out)]
    assert kept[0] == kept[1]


def test_steps_follow_from_epochs(folder):
    tokenizer = kvjax.load_tokenizer(folder / "mla")
    once, _ = steps_and_data(settings(folder, steps=None, epochs=1), tokenizer)
    thrice, _ = steps_and_data(settings(folder, steps=None, epochs=3), tokenizer)
    assert once >= 2 and abs(thrice - 3 * once) <= 3
    steps, data = steps_and_data(settings(folder, steps=5 * once), tokenizer)
    assert steps == 5 * once and data.epochs == 6


def test_settings_from_a_file_and_flags(tmp_path, folder):
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndata: [metamath:a.jsonl@0.5, 'sc2:b.jsonl']\ntrain: [attention]\n")
    assert read_config(path).train == ("attention",)
    flags = ["--config", str(path), "--out", "o", "--learning-rate", "0.5", "--batch-size", "8"]
    arguments = parse(flags)
    assert arguments.settings == read_config(path, learning_rate=0.5, batch_size=8)
    sources = arguments.settings.data_config.sources
    assert [(s.format, s.path, s.weight) for s in sources] == [
        ("metamath", "a.jsonl", 0.5),
        ("sc2", "b.jsonl", 1.0),
    ]
    assert (parse(["--model", "m"]).settings.batch_size, TuneConfig("m").learning_rate) == (
        16,
        2e-5,
    )
    path.write_text("model: m\nlearning-rate: 1\n")
    with pytest.raises(
        ValueError, match=r"got an unknown field 'learning-rate', expected some of .*b1"
    ):
        read_config(path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch_size": 6, "accumulate": 4}, "batch_size 6 and accumulate 4"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0, expected a finite number above 0"),
        ({"mesh": "data:2"}, "expected a form like data=1"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        TuneConfig("m", ("plain:a",), **changes)


@pytest.mark.parametrize("text", ["a.jsonl", "plain:", "plain:a@much", ":a", "plain:a@0"])
def test_bad_sources(text):
    with pytest.raises(ValueError, match=r"FORMAT:PATH"):
        parse_source(text)


def test_a_run_on_a_mesh_is_the_run_on_one_device(folder, finished, tmp_path):
    if len(jax.devices()) < 4:
        pytest.skip("needs 4 devices")
    config = settings(folder, mesh="data=2,fsdp=2,tensor=2")
    run(config, tmp_path)
    one, many = (log.read(out / "metrics.jsonl") for out in (finished[0], tmp_path))
    for a, b in zip(one, many, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-4)
        assert a["tokens"] == b["tokens"]
    with pytest.raises(ValueError, match="expected a product of 8 devices"):
        load(settings(folder, mesh="data=3"))


def test_dry_run(folder, capsys):
    command = ["finetune", "--dry-run", "--model", str(folder / "gqa" / "config.json")]
    main([*command, "--sequence-length", "32", "--batch-size", "16", "--dtype", "float32"])
    printed = capsys.readouterr().out
    assert "bytes_per_device" in printed and "8 × cpu" in printed
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--batch-size", "12"])
    assert stopped.value.code == 2
    assert "expected a multiple" in capsys.readouterr().err
