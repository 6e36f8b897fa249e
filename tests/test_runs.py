"""Files of a run: another run's are refused, results are whole, torn lines are cut off."""

import json
import os

import pytest

from kvjax import runs

ADVICE = "give another folder"


def claim(path, settings, **options):
    runs.claim(path, settings, f"{path.parent} holds another run", ADVICE, **options)


def test_a_run_is_claimed_once_and_resumed_with_the_same_settings(tmp_path):
    path = tmp_path / "run" / "config.json"
    claim(path, {"seed": 0, "sizes": (1, 2)})
    claim(path, {"seed": 0, "sizes": (1, 2)})
    assert json.loads(path.read_text()) == {"seed": 0, "sizes": [1, 2]}
    assert [file.name for file in path.parent.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 1, "dtype": "float32"}, r"\(seed 0, now 1\): give another folder"),
        ({"seed": 1, "dtype": "bfloat16"}, r"\(seed 0, now 1, dtype float32, now bfloat16\)"),
        ({"seed": 0}, r"\(dtype float32, now None\)"),
        ({"seed": 0, "dtype": "float32", "new": 3}, r"\(new None, now 3\)"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, settings, message):
    path = tmp_path / "config.json"
    claim(path, {"seed": 0, "dtype": "float32"})
    before = path.read_text()
    with pytest.raises(ValueError, match=f"holds another run {message}"):
        claim(path, settings)
    assert path.read_text() == before


def test_settings_that_may_change(tmp_path):
    path = tmp_path / "config.json"
    claim(path, {"seed": 0, "keep": 2})
    claim(path, {"seed": 0, "keep": 3}, ignored={"keep"})
    assert json.loads(path.read_text())["keep"] == 3
    with pytest.raises(ValueError, match="seed 0, now 1"):
        claim(path, {"seed": 1, "keep": 3}, ignored={"keep"})


@pytest.mark.parametrize(
    ("text", "message"),
    [("[1]", "holds a list"), ("{", "is not JSON"), ("[" * 100_000, "not JSON")],
)
def test_damaged_settings(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"config\.json.* {message}"):
        claim(tmp_path / "config.json", {})


def test_a_torn_line_is_left_out_and_cut_off(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert runs.whole_lines(path) == []
    runs.cut_torn_line(path)  # without a file there is nothing to cut
    runs.append_lines(path, [{"x": 0.1}, {"x": 1 / 3}])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"x": 0.')
    assert [json.loads(line)["x"] for line in runs.whole_lines(path)] == [0.1, 1 / 3]
    assert path.read_bytes() != whole
    runs.cut_torn_line(path)
    assert path.read_bytes() == whole


def test_a_file_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    runs.write_json(path, {"a": 1})
    monkeypatch.setattr(runs.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        runs.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_pipe_gets_the_text_and_stays_a_pipe(tmp_path):
    pipe = tmp_path / "pipe"  # like /dev/stdout, which must not become a file
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        runs.write_json(pipe, {"a": 1})
        assert json.loads(os.read(reader, 1000)) == {"a": 1}
    finally:
        os.close(reader)
    assert pipe.is_fifo()
