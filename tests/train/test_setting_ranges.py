"""Numbers of training settings: NaN, infinity, other types and ranges, from Python and YAML."""

import dataclasses
from pathlib import Path

import pytest

from train.__main__ import main
from train.compare.config import CompareConfig, read_compare
from train.data import DataConfig, SourceConfig
from train.finetune.config import TuneConfig, read_config, with_dtype
from train.pretrain.curriculum import Curriculum, ModelShape, Stage, read_curriculum
from train.pretrain.episodes import EpisodeConfig

RECIPE = Path(__file__).parents[2] / "train" / "pretrain" / "needle.yaml"
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "name, values, expected",
    [
        ("learning_rate", (NAN, INF, -INF, 0, -1e-5, 1e39, 1e-50, "2e-5", True), "above 0"),
        ("clip", (NAN, INF, 0.0, -1.0, None), "above 0"),
        ("warmup", (NAN, INF, -0.01, 1.01), "from 0 to 1"),
        ("b1", (NAN, INF, 1.0, -0.1, 0.9999999999), "of at least 0 and below 1"),
        ("b2", (NAN, INF, 1.0, -0.1, 0.9999999999), "of at least 0 and below 1"),
        ("weight_decay", (NAN, INF, -0.1), "of at least 0"),
        ("distill", (NAN, INF, -0.1), "of at least 0"),
        ("epochs", (NAN, INF, 0, -1), "above 0"),
        ("steps", (NAN, 0, -1, 2.5, True), "from 1 to"),
        ("max_rows", (NAN, 0, -1, 2.0), "from 1 to"),
        ("batch_size", (NAN, 0, -1, 2.0, 2**31, "8"), "from 1 to"),
        ("accumulate", (NAN, 0, -1), "from 1 to"),
        ("sequence_length", (NAN, 1, 0, -8), "from 2 to"),
        ("checkpoint_every", (NAN, INF, 0, -1), "from 1 to"),
        ("log_every", (NAN, INF, 0, -1), "from 1 to"),
        ("keep", (0, -1), "from 1 to"),
        ("seed", (-1, NAN, 0.5), "from 0 to"),
        ("remat", ("no",), "true or false"),
        ("dtype", ("float99",), "one of bfloat16, float32 or null"),
        ("data", ("plain:a",), "a list"),
    ],
)
def test_a_fine_tuning_setting_out_of_its_range_is_refused(name, values, expected):
    for value in values:
        with pytest.raises(ValueError, match=rf"^{name} is .*, expected .*{expected}"):
            TuneConfig("m", **{name: value})


def test_the_ends_of_the_ranges_are_allowed():
    TuneConfig("m", warmup=0, b1=0.0, b2=0, weight_decay=0, distill=0, sequence_length=2, seed=0)
    TuneConfig("m", warmup=1.0, epochs=0.5, steps=None, clip=1e30, learning_rate=1e30)


def test_all_that_is_wrong_with_a_run_is_one_error(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: m\nlearning_rate: .nan\nclip: .inf\nb1: 1\nweight_decay: 1e-2\n")
    with pytest.raises(ValueError) as error:
        read_config(path)
    assert str(error.value).splitlines() == [
        f"{path}: learning_rate is nan, expected a finite number above 0",
        f"{path}: b1 is 1, expected a finite number of at least 0 and below 1",
        f"{path}: clip is inf, expected a finite number above 0",
    ]


def test_a_number_of_json_is_one_in_yaml_and_a_text_is_none(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: m\nlearning_rate: 1e-3\nweight_decay: 1E+0\n")
    config = read_config(path)
    assert (config.learning_rate, config.weight_decay) == (1e-3, 1.0)
    path.write_text('model: m\nlearning_rate: "1e-3"\nweight_decay: 1e-3x\n')
    with pytest.raises(ValueError, match=r"rate is '1e-3', expected .*\n.*decay is '1e-3x', exp"):
        read_config(path)


def test_the_command_refuses_nan_before_any_work(tmp_path, capsys):
    out = tmp_path / "run"
    command = ["finetune", "--model", "none", "--out", str(out), "--data", "plain:none.jsonl"]
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--learning-rate", "nan"])
    assert stopped.value.code == 2 and not out.exists()
    assert capsys.readouterr().err == (
        "train: error: learning_rate is nan, expected a finite number above 0\n"
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"epochs": NAN}, "epochs is nan"),
        ({"batch_size": 2.0}, "batch_size is 2.0"),
        ({"seed": True, "max_rows": 0}, "seed is True.*\nmax_rows is 0"),
    ],
)
def test_data_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        DataConfig((SourceConfig("a.jsonl", "plain"),), **changes)


@pytest.mark.parametrize("weight", [NAN, INF, 0, -1.0])
def test_weights_of_sources(weight):
    with pytest.raises(ValueError, match=f"weight is {weight}, expected a finite number above 0"):
        SourceConfig("a.jsonl", "plain", weight)


def recipe(model=None, stage=None, episodes=None, **changes):
    asked = {"length": 24, "people": (2, 2), "answer_length": (1, 1), "questions": 1}
    asked |= {"kinds": {"thing": 1}, **(episodes or {})}
    shape = dataclasses.replace(ModelShape(16, 1, 2, 1, 8, 16, 64), **(model or {}))
    taken = {"batch_size": 2, "max_steps": 4, **(stage or {})}
    return Curriculum(shape, (Stage(EpisodeConfig(**asked), **taken),), **changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"learning_rate": NAN}, "learning_rate is nan"),
        ({"warmup_steps": 0}, "warmup_steps is 0"),
        ({"warmup_steps": -5}, "warmup_steps is -5"),
        ({"b2": 1.0}, "b2 is 1.0"),
        ({"weight_decay": INF}, "weight_decay is inf"),
        ({"clip": -1.0}, "clip is -1.0"),
        ({"embedding_scale": NAN}, "embedding_scale is nan"),
        ({"text_weight": -1.0}, "text_weight is -1.0"),
        ({"rehearsal": 1.5}, "rehearsal is 1.5"),
        ({"report_every": 0}, "report_every is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"model": {"num_layers": 0}}, "model.num_layers is 0"),
        ({"model": {"num_heads": 3, "num_kv_heads": 2}}, "model.num_heads is 3"),
        ({"model": {"head_dim": 7}}, "model.head_dim is 7"),
        ({"model": {"rope_theta": NAN}}, "model.rope_theta is nan"),
        ({"model": {"norm_eps": -1e-5}}, "model.norm_eps is -1e-05"),
        ({"stage": {"batch_size": 0}}, r"stages\[0\].batch_size is 0"),
        ({"stage": {"max_steps": -1}}, r"stages\[0\].max_steps is -1"),
        ({"stage": {"gate": NAN}}, r"stages\[0\].gate is nan"),
        ({"stage": {"rehearses": -1}}, r"stages\[0\].rehearses is -1"),
        ({"stage": {"rehearses": 1}}, r"stages\[0\].rehearses is 1, expected 0 to 0"),
        ({"stage": {"learning_rate_scale": INF}}, r"stages\[0\].learning_rate_scale is inf"),
        ({"episodes": {"wording": NAN}}, r"stages\[0\].episodes.wording is nan"),
        ({"episodes": {"length": 65}}, "length is 65, expected at most .* 64"),
        ({"episodes": {"people": (3, 2)}}, r"people is \[3, 2\]"),
        ({"episodes": {"answer_length": (0, 2)}}, r"answer_length is \(0, 2\)"),
        ({"episodes": {"kinds": {"thing": NAN}}}, "kinds.thing is nan"),
        ({"episodes": {"kinds": {"thing": 0}}}, "all shares are 0"),
        ({"episodes": {"kinds": {"thing": 1, "copy": 1}}}, "expected alone"),
        ({"episodes": {"kinds": {}}}, "expected the share of each kind"),
    ],
)  # fmt: skip
def test_recipes(changes, message):
    recipe()
    with pytest.raises(ValueError, match=message):
        recipe(**changes)


def test_all_that_is_wrong_with_a_recipe_is_one_error(tmp_path):
    text = RECIPE.read_text().replace("learning_rate: 2.0e-3", "learning_rate: .nan")
    text = text.replace("head_dim: 32", "head_dim: 0").replace("max_steps: 575", "max_steps: -3")
    path = tmp_path / "recipe.yaml"
    path.write_text(text.replace("wording: 0.3", "wording: .inf"))
    with pytest.raises(ValueError) as error:
        read_curriculum(path)
    named = [line.split(" is ")[0].split(" ")[-1] for line in str(error.value).splitlines()]
    assert named == [
        "model.head_dim", "stages[2].episodes.wording", "stages[9].max_steps", "learning_rate",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "text", "1: 2", "[" * 5000])
@pytest.mark.parametrize("read", [read_config, read_curriculum, read_compare])
def test_a_file_that_holds_no_settings(tmp_path, read, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"run\.yaml"):
        read(path)
    with pytest.raises(ValueError, match=r"no file at .*none\.yaml"):
        read(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rates": (1e-3, NAN)}, r"rates\[1\] is nan"),
        ({"rates": (INF,)}, r"rates\[0\] is inf"),
        ({"rates": ()}, "rates is"),
        ({"paper_rate": NAN}, "paper_rate is nan"),
        ({"warmup": 2.0}, "warmup is 2.0"),
        ({"eval_every": 0}, "eval_every is 0"),
        ({"eval_rows": 0}, "eval_rows is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"sequence_length": 1}, "sequence_length is 1"),
        ({"seeds": 0, "rows": -1}, "rows is -1.*\nseeds is 0"),
        ({"families": ("songs",)}, r"families\[0\] is 'songs', expected one of word_problems"),
    ],
)
def test_comparisons(changes, message):
    with pytest.raises(ValueError, match=message):
        CompareConfig(**changes)


def test_the_dtype_follows_the_devices_unless_it_is_named():
    config = TuneConfig("model")
    assert [with_dtype(config, p).dtype for p in ("cpu", "tpu")] == ["float32", "bfloat16"]
    assert with_dtype(config).dtype == "float32"  # the tests run on CPUs
    assert with_dtype(TuneConfig("model", dtype="bfloat16"), "cpu").dtype == "bfloat16"
