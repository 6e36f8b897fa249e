"""URLs are refused in one line before any work, wherever a path is read or written."""

from pathlib import Path

import numpy as np
import pytest
from toys import random_params

import eval.__main__
import kvjax
import kvjax.cli
import train.__main__
from eval.command import task_options
from eval.rows import read_rows
from kvjax.context import load_context
from kvjax.data_files import open_rows
from kvjax.headkv import HeadScores, load_scores
from kvjax.hf import check_export, config_from_hf, layout_of, open_params, read_model, read_shape
from kvjax.nn import Transformer
from kvjax.paths import check_local, local_path
from kvjax.policies.named import parse_policy
from kvjax.tasks import WordVocabulary
from kvjax.tasks.prompt import read_haystack
from kvjax.transmla.calibration import Stats
from train.finetune.config import TuneConfig, read_config
from train.finetune.run import finetune

BUCKET = "gs://bucket/thing"
RAW = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 16,
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Tests run in an empty folder, which is empty afterwards too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield tmp_path
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(("gs", "s3", "out"))]


# --- The function ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "gs://bucket/a",
        "GS://bucket/a",
        " gs://bucket/a",
        "gs:///a",
        "s3://bucket/a",
        "s3a://bucket/a",
        "http://host/a",
        "https://huggingface.co/org/name",
        "hf://org/name",
        "file:///tmp/a",
        "abfss://box@account.dfs.core.windows.net/a",
        "dbfs:/mnt/a",
    ],
)
def test_every_scheme_is_refused_as_text_and_as_a_path(url):
    for path in (url, Path(url)):
        with pytest.raises(ValueError) as e:
            local_path(path, "OUT")
        assert str(e.value).startswith("OUT is the URL ") and "\n" not in str(e.value)
        assert ", expected a local path: " in str(e.value)
        assert url.strip().split(":")[0] + "://" in str(e.value)


def test_the_message_says_what_to_do():
    for url, advice in (
        (BUCKET, "gcloud storage cp"),
        ("s3://bucket/a", "aws s3 cp"),
        ("hf://org/name", "give its id alone, such as org/name"),
        ("https://huggingface.co/org/name", "give its id alone, such as org/name"),
        ("file:///tmp/a", "give the path alone"),
        ("abfs://a", "copy it to a local folder, or mount it as one"),
    ):
        with pytest.raises(ValueError, match=advice):
            local_path(url)
    with pytest.raises(ValueError, match="the URL gs://bucket/thing, "):
        local_path(Path(BUCKET))  # which is "gs:/bucket/thing" by now


@pytest.mark.parametrize(
    "path",
    [
        "out",
        "/a/b",
        "./gs:/a",
        "C:\\models\\x",
        "C:/models/x",
        "run:1/model",
        "a/b:/c",
        "builtin:needle",
        "org/name",
        "org/name:subset",
        "hub:wikitext:wikitext-2:test",
        "12:/x",
        "",
    ],
)
def test_local_paths_stay_what_they_are(path):
    assert local_path(path) == Path(path)


def test_folders_whose_names_end_with_a_colon(here):
    (here / "box:").mkdir()
    assert local_path("box:/a") == local_path(Path("box:/a")) == Path("box:/a")
    with pytest.raises(ValueError, match="the URL box://a"):
        local_path("box://a")
    (here / "s3:").mkdir()  # what a version that took URLs for folders has left
    with pytest.raises(ValueError, match="the URL s3://bucket"):
        local_path(Path("s3://bucket"))
    (here / "s3:").rmdir()


def test_arguments_are_searched_for_paths():
    check_local({"model": BUCKET, "prompt": "http://a is a link", "out": Path("a"), "n": None})
    for value in ({"out": Path(BUCKET)}, {"runs": (Path("a"), Path(BUCKET))}):
        with pytest.raises(ValueError, match=f"{next(iter(value))} is the URL"):
            check_local(value)


# --- The library -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    model = Transformer(config_from_hf(RAW))
    return model, random_params(model)


@pytest.mark.parametrize("kind", [str, Path])
def test_what_is_read(model, kind):
    url = kind(BUCKET)
    for read in (
        kvjax.load,
        kvjax.load_tokenizer,
        read_model,
        open_params,
        layout_of,
        check_export,
        load_scores,
        Stats.load,
        lambda path: read_shape(str(path)),
        lambda path: load_context(path, *model),
        lambda path: read_haystack(path, WordVocabulary()),
        lambda path: kvjax.transmla.calibrate(*model, [], resume=path),
        lambda path: kvjax.headkv.score_heads(*model, None, haystack=path),
        lambda path: parse_policy(f"headkv:scores={path}"),
        lambda path: read_rows(Path(path)),
        lambda path: open_rows(str(path)),
        lambda path: read_config(Path(path)),
    ):
        with pytest.raises(ValueError, match="is the URL gs://bucket/thing, expected a local path"):
            read(url)


@pytest.mark.parametrize("kind", [str, Path])
def test_what_is_written(model, kind):
    moments = kvjax.transmla.calibrate(*model, [np.ones((1, 8), np.int32)])
    context = kvjax.compress(*model, list(range(1, 9)), "snapkv:kv_size=4,observed=2")
    writes = [
        HeadScores(np.ones((1, 2, 1))).save,
        moments.save,
        context.save,
        *(
            lambda path, layout=layout: kvjax.save(*model, path, layout=layout)
            for layout in ("native", "hf", "deepseek_v3")
        ),
    ]
    for write in writes:
        with pytest.raises(ValueError, match="is the URL gs://bucket/thing, expected a local path"):
            write(kind(BUCKET))


# --- The commands ----------------------------------------------------------------------------
# No model of these exists: a command that began its work would say that instead.

NONE = "builtin:none"


def fails(capsys, main, name, *argv):
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in argv])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(lines) == 1, lines
    assert lines[0].startswith(f"{name}: error: ")
    return lines[0]


@pytest.mark.parametrize(
    "argv",
    [
        ("info", BUCKET),
        ("info", NONE, "--json", BUCKET),
        ("convert", BUCKET, "out"),
        ("convert", NONE, BUCKET),
        ("convert", NONE, "out", "--method", "decoupled", "--calibration", BUCKET),
        ("convert", NONE, "out", "--stats", BUCKET),
        ("convert", NONE, "out", "--json", BUCKET),
        ("export", BUCKET, "out"),
        ("export", NONE, BUCKET),
        ("export", NONE, "out", "--norm", "rms", "--calibration", BUCKET),
        ("score", BUCKET, "out.json"),
        ("score", NONE, BUCKET),
        ("score", NONE, "out.json", "--haystack", BUCKET),
        ("generate", BUCKET, "text"),
        ("generate", NONE, "text", "--context", BUCKET),
        ("generate", NONE, "text", "--json", BUCKET),
        ("generate", NONE, "text", "--policy", f"headkv:kv_size=16,scores={BUCKET}"),
        ("compress", NONE, BUCKET, "out"),
        ("compress", NONE, "text", BUCKET),
        ("plan", BUCKET, "--topology", "h200:8"),
        ("plan", NONE, "--topology", "h200:8", "--json", BUCKET),
        ("demo", "--out", BUCKET),
        ("demo", "--json", BUCKET),
    ],
    ids=" ".join,
)
def test_kvjax(capsys, argv):
    line = fails(capsys, kvjax.cli.main, "kvjax", *argv)
    assert "is the URL gs://bucket/thing, expected a local path: copy it with `gcloud" in line


def test_prompts_may_be_urls(capsys):
    line = fails(capsys, kvjax.cli.main, "kvjax", "generate", NONE, "https://a.b is")
    assert "no builtin model" in line


TASK = ("needle", "--model", NONE, "--out", "out")


@pytest.mark.parametrize(
    "argv",
    [
        ("needle", "--model", BUCKET, "--out", "out"),
        ("needle", "--model", NONE, "--out", BUCKET),
        (*TASK, "--data-dir", BUCKET),
        (*TASK, "--set", f"haystack={BUCKET}"),
        (*TASK, "--json-file.json", BUCKET),
        (*TASK, "--policy", f"headkv:kv_size=16,scores={BUCKET}"),
        ("latency", "--model", NONE, "--out", BUCKET),
        ("latency", "--model", NONE, "--policy", f"headkv_paper:scores={BUCKET}"),
        ("perplexity", "--model", NONE, "--text", BUCKET),
        ("perplexity", "--model", NONE, "--text", "a.txt", "--out", BUCKET),
        ("report", BUCKET),
        ("report", "runs", "--out", BUCKET),
        ("report", "runs", "--head-scores", BUCKET),
        ("run", BUCKET),
        ("run", "a.yaml", "--out", BUCKET),
        ("run", "a.yaml", "--data-dir", BUCKET),
        ("run", "a.yaml", "--scores", BUCKET),
    ],
    ids=" ".join,
)
def test_eval(capsys, argv):
    argv = [word.replace("--json-file.json", "--json") for word in argv]
    line = fails(capsys, eval.__main__.main, "eval", *argv)
    assert "is the URL gs://bucket/thing, expected a local path: copy it with `gcloud" in line


def test_settings_of_a_task(capsys):
    class Command:
        settings = (f"haystack={BUCKET}",)

    with pytest.raises(ValueError, match="haystack is the URL gs://bucket/thing"):
        task_options(Command(), None)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "run",
    [
        f"model: {BUCKET}",
        f"policies: ['headkv:scores={BUCKET},kv_size=16']",
        f"options: {{text: [a.txt, '{BUCKET}']}}",
        f"options: {{set: {{haystack: '{BUCKET}'}}}}",
    ],
)
def test_recipes_are_refused_before_their_first_run(capsys, here, run):
    first = "  - {name: a, command: latency}\n"
    second = f"  - name: b\n    command: perplexity\n    {run}\n"
    (here / "a.yaml").write_text(f"model: {NONE}\nruns:\n{first}{second}")
    line = fails(capsys, eval.__main__.main, "eval", "run", "a.yaml", "--out", "runs")
    assert "run 2: " in line and "is the URL gs://bucket/thing, expected a local path" in line


TUNE = ("finetune", "--model", NONE, "--data", "text:a.txt")
RECIPE = Path(__file__).parents[1] / "train" / "pretrain" / "needle.yaml"


@pytest.mark.parametrize(
    "argv",
    [
        ("finetune", "--model", BUCKET, "--data", "text:a.txt", "--out", "out"),
        (*TUNE, "--out", BUCKET),
        (*TUNE, "--out", "out", "--json", BUCKET),
        (*TUNE, "--out", "out", "--tokenizer", BUCKET),
        (*TUNE, "--out", "out", "--teacher", BUCKET),
        ("finetune", "--model", NONE, "--out", "out", "--data", f"text:{BUCKET}@0.5"),
        ("finetune", "--model", BUCKET, "--dry-run"),
        ("finetune", "--config", BUCKET),
        ("pretrain", "--config", BUCKET, "--out", "out"),
        ("pretrain", "--config", RECIPE, "--out", BUCKET),
        ("export", "--config", RECIPE, "--run", BUCKET, "--out", "out"),
        ("export", "--config", RECIPE, "--run", "run", "--out", BUCKET),
        ("evaluate", "--model", BUCKET),
        ("evaluate", "--model", NONE, "--out", BUCKET),
        ("curve", "--config", RECIPE, "--metrics", BUCKET, "--out", "out.png"),
        ("curve", "--config", RECIPE, "--metrics", "m.jsonl", "--out", BUCKET),
        ("family", "--name", "programs", "--out", BUCKET),
        ("compare", "--out", BUCKET),
        ("compare", "--out", "out", "--config", BUCKET),
    ],
    ids=lambda argv: " ".join(map(str, argv)),
)
def test_train(capsys, argv):
    line = fails(capsys, train.__main__.main, "train", *argv)
    assert "is the URL gs://bucket/thing, expected a local path: copy it with `gcloud" in line


def test_a_comparison_s_model(capsys, here):
    (here / "c.yaml").write_text(f"model: {BUCKET}\n")
    line = fails(
        capsys, train.__main__.main, "train", "compare", "--out", "out", "--config", "c.yaml"
    )
    assert "model is the URL gs://bucket/thing" in line


def test_finetune_called_as_a_function():
    for changes in ({"model": BUCKET}, {"teacher": BUCKET}, {"data": (f"text:{BUCKET}",)}):
        config = TuneConfig(**{"model": NONE, "data": ("text:a.txt",), **changes})
        with pytest.raises(ValueError, match="is the URL gs://bucket/thing"):
            finetune(config, Path("out"))
