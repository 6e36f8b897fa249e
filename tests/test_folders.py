"""A folder that is saved is whole or absent, wherever the process or the disk ends."""

import json
import os
import socket
import subprocess
import sys

import pytest
from llama_toy import TINY
from toys import random_params

import kvjax
from kvjax import folders
from kvjax.endings import lock_of, only_writer
from kvjax.folders import MADE, PART, made, record_made, whole_folder
from kvjax.hf.config import config_from_hf
from kvjax.nn import Transformer

CONFIG = "config.json"


class Killed(BaseException):
    """In place of kill -9: nothing is cleaned up."""


def content(folder):
    if not folder.exists():
        return None
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def fill(out, *names):
    with whole_folder(out) as part:
        for name in names:
            (part / name).write_text(name)


NAMES = ("a", "b", CONFIG)
WHOLE = {name: name for name in NAMES}


@pytest.mark.parametrize("exists", [False, True])
def test_an_error_leaves_nothing(tmp_path, exists):
    out = tmp_path / "out"
    before = {"notes": "of the user"} if exists else None
    if exists:
        out.mkdir()
        (out / "notes").write_text("of the user")
    with pytest.raises(OSError, match="full"), whole_folder(out) as part:
        (part / CONFIG).write_text("half")
        assert content(out) != WHOLE
        raise OSError("the disk is full")
    assert content(out) == before
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if exists else [])
    fill(out, *NAMES)
    assert content(out) == {**(before or {}), **WHOLE}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("moment", range(4))
@pytest.mark.parametrize("exists", [False, True])
def test_a_killed_save_is_cleared_by_the_next(tmp_path, monkeypatch, exists, moment):
    """Killed before the first rename, or between two of them."""
    out, count = tmp_path / "out", 0
    if exists:
        out.mkdir()

    def replace(source, target, rename=os.replace):
        nonlocal count
        if str(target).endswith(folders.MOVED):  # the list, which `replacing` writes
            return rename(source, target)
        count += 1
        if count > moment:
            raise Killed
        return rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(folders, "_clear", lambda *_: None)
        patch.setattr(folders.os, "replace", replace)
        patch.setattr(folders.os, "rename", replace)
        killed = moment < (3 if exists else 1)
        try:
            fill(out, *NAMES)
        except Killed:
            assert killed
    left = content(out) or {} if not exists else {p.name for p in out.iterdir()}
    assert CONFIG not in left or not killed  # no reader takes it for a model
    (out / CONFIG).unlink(missing_ok=True)
    for name in NAMES if not killed else ():
        (out / name).unlink(missing_ok=True)
    fill(out, *NAMES)
    assert content(out) == WHOLE
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["..", ".", "", "../other", "/etc/passwd", "a/b", "\0"])
def test_only_names_of_the_folder_itself_are_removed(tmp_path, name):
    out = tmp_path / "out"
    (out / PART).mkdir(parents=True)
    (out / PART / folders.MOVED).write_text(json.dumps({name: True, "b": True}))
    for kept in (tmp_path / "other", out / "a" / "b", out / "b"):
        kept.parent.mkdir(exist_ok=True)
        kept.write_text("kept")
    fill(out, "c", CONFIG)
    assert content(out) == {"c": "c", CONFIG: CONFIG}
    assert (tmp_path / "other").exists() and (out / "a" / "b").exists()


def test_what_was_there_before_is_not_taken_for_a_leftover(tmp_path, monkeypatch):
    (tmp_path / "b").write_text("of the user")

    def stopped(source, target, rename=os.replace):
        if str(target).endswith("/b"):
            raise Killed
        return rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(folders.os, "replace", stopped)
        with pytest.raises(Killed):
            fill(tmp_path, *NAMES)
    assert content(tmp_path) == {"b": "of the user"}


def test_a_second_save_at_the_same_time_is_told_of_the_first(tmp_path):
    out = tmp_path / "out"
    with whole_folder(out) as part:
        (part / CONFIG).write_text("")
        with pytest.raises(ValueError, match=f"is being written by process {os.getpid()} on"):
            fill(out, CONFIG)
    assert content(out) == {CONFIG: ""}


def test_a_folder_remembers_its_command(tmp_path):
    out, request = tmp_path / "out", {"rank": 8, "sizes": (1, 2)}
    assert made(out, request) is None
    with whole_folder(out) as part:
        record_made(part, request, {"loss": 0.5})
        (part / CONFIG).write_text("")
    assert made(out, request) == {"loss": 0.5}
    with pytest.raises(ValueError, match=r"result of other settings \(rank 8, now 9\)"):
        made(out, {**request, "rank": 9})
    (out / CONFIG).unlink()
    assert made(out, request) is None  # it is not whole
    (out / CONFIG).touch()
    (out / MADE).write_text(json.dumps({"request": []}))
    with pytest.raises(ValueError, match=rf"{MADE}: request is \[\], expected an object"):
        made(out, request)


@pytest.mark.parametrize("exists", [False, True])
def test_a_finished_command_removes_what_a_kill_left_after_its_last_file(tmp_path, exists):
    out, request = tmp_path / "out", {"rank": 8}
    with whole_folder(out) as part:
        record_made(part, request, {"loss": 0.5})
        (part / CONFIG).write_text("")
    left = out / PART if exists else tmp_path / f"out{PART}"
    left.mkdir()
    (left / folders.MOVED).write_text(json.dumps({CONFIG: True}))
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], stdout=-1)
    lock_of(left).write_text(f"{int(dead.stdout)}\n{socket.gethostname()}\n")
    assert made(out, request) == {"loss": 0.5}
    assert sorted(path.name for path in out.iterdir()) == sorted([CONFIG, MADE])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with only_writer(left), pytest.raises(ValueError, match="is being written by process"):
        made(out, request)


@pytest.mark.parametrize("layout", ["hf", "native"])
def test_a_save_that_was_stopped_is_no_model_and_can_be_repeated(tmp_path, monkeypatch, layout):
    model = Transformer(config_from_hf({**TINY, "eos_token_id": 2, "torch_dtype": "float32"}))
    params, out = random_params(model), tmp_path / "model"
    with monkeypatch.context() as patch:
        patch.setattr(folders, "_clear", lambda *_: None)
        patch.setattr(folders, "sync_all", lambda _: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            kvjax.save(model, params, out, layout=layout)
    assert not out.exists() and (tmp_path / f"model{PART}").is_dir()
    kvjax.save(model, params, out, layout=layout)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert kvjax.load(out)[0].config.layers == model.config.layers
