"""The persistent compilation cache of the command lines: who turns it on, where it is, its size."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import eval.__main__
import kvjax.cli
import train.__main__
from kvjax import compilation_cache, processes

ROOT = Path(__file__).parents[1]
DEFAULTS = {
    "jax_enable_compilation_cache": True,
    "jax_compilation_cache_dir": None,
    "jax_persistent_cache_min_compile_time_secs": 1.0,
}
SETTINGS = ("JAX_ENABLE_COMPILATION_CACHE", *(name.upper() for name in DEFAULTS))


def settings():
    return {name: getattr(jax.config, name) for name in DEFAULTS}


@pytest.fixture
def user(tmp_path, monkeypatch):
    """A user without settings; nothing may be compiled here, and jax's settings come back."""
    before = settings()
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, value in DEFAULTS.items():
        jax.config.update(name, value)
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)


WORKER = """
import json, sys, warnings
import jax, jax.numpy as jnp
from compilations import counted
from kvjax import compilation_cache

warnings.simplefilter("error")
if sys.argv[1] == "command":
    compilation_cache.enable()
with counted() as programs:
    jax.jit(lambda x: jnp.sort(x @ x))(jnp.ones((4, 4))).block_until_ready()
print(json.dumps([len(programs.compiled), len(programs.from_cache)]))
"""


def start(cache, who):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    kept = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, who],
        env=kept | {"PYTHONPATH": path, "XDG_CACHE_HOME": str(cache)},
        stdout=subprocess.PIPE,
        text=True,
    )


def programs(process):
    """(compiled, read from the cache) in a process, at its end."""
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return json.loads(out)


def test_a_second_process_compiles_nothing_and_the_library_keeps_nothing(tmp_path):
    compiled, read = programs(start(tmp_path, "library"))
    assert compiled > 0 and read == 0
    assert not any(tmp_path.iterdir())
    # Two at once write the same programs.
    for total in [sum(programs(p)) for p in [start(tmp_path, "command") for _ in range(2)]]:
        assert total == compiled
    assert programs(start(tmp_path, "command")) == [0, compiled]
    assert [path.name for path in tmp_path.glob("kvjax/*")] == [f"jax-{jax.__version__}"]


def test_the_users_cache_folder_and_small_programs(user):
    compilation_cache.enable()
    folder = user / "cache" / "kvjax" / f"jax-{jax.__version__}"
    assert settings() == {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_folder_that_is_no_absolute_path_is_not_xdgs(user, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(user / "home"))
    compilation_cache.enable()
    assert settings()["jax_compilation_cache_dir"].startswith(f"{user}/home/.cache/kvjax/")


def test_what_the_user_told_jax_counts(user, monkeypatch):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")
    jax.config.update("jax_compilation_cache_dir", str(user / "own"))
    before = settings()
    compilation_cache.enable()
    assert settings() == before
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    before = settings()
    compilation_cache.enable()
    assert settings() == before
    assert not any(user.iterdir())


def test_a_choice_counts_more(user):
    jax.config.update("jax_compilation_cache_dir", str(user / "own"))
    compilation_cache.enable(str(user / "chosen"), several=True)
    assert settings()["jax_compilation_cache_dir"] == str(user / "chosen")
    compilation_cache.enable("off")
    assert not settings()["jax_enable_compilation_cache"]
    with pytest.raises(ValueError, match="URL gs://bucket"):
        compilation_cache.enable("gs://bucket")


def test_a_folder_that_cannot_be_written_is_one_line(user, monkeypatch, capsys):
    (user / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(user / "file"))
    compilation_cache.enable()
    compilation_cache.enable(str(user / "file" / "folder"))
    assert settings() == DEFAULTS
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all("kvjax: warning: compiled programs are not kept" in line for line in lines)


def test_several_processes_use_no_folder_that_nobody_named(user):
    compilation_cache.enable(several=True)
    assert settings() == DEFAULTS
    jax.config.update("jax_compilation_cache_dir", str(user / "own"))
    compilation_cache.enable(several=True)
    assert settings()["jax_persistent_cache_min_compile_time_secs"] == 0.0


def test_old_programs_go_first_and_empty_ones_always(tmp_path):
    for version, name, size, used in [
        ("jax-1", "old", 100, 1000),
        ("jax-1", "new", 100, 3000),
        ("jax-2", "middle", 100, 2000),
        ("jax-2", "empty", 0, 4000),
    ]:
        path = tmp_path / version / f"{name}-cache"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(size))
        os.utime(path, (used, used))
    (tmp_path / "jax-2" / "of-someone-else").write_bytes(bytes(1000))
    compilation_cache.tidy(tmp_path, 200)
    left = {path.name for path in tmp_path.glob("*/*")}
    assert left == {"new-cache", "middle-cache", "of-someone-else"}


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (kvjax.cli.main, ["info", "nothing-is-here"]),
        (train.__main__.main, ["curve", "--config", "no", "--metrics", "no", "--out", "no"]),
        (train.__main__.main, ["finetune", "--model", "nothing-is-here", "--data", "no"]),
        (eval.__main__.main, ["needle", "--model", "nothing-is-here"]),
    ],
)
def test_every_command_takes_the_flag(monkeypatch, main, words):
    seen = []
    monkeypatch.setattr(compilation_cache, "enable", lambda *given: seen.append(given[0]))
    monkeypatch.setattr(processes, "stop", sys.exit)
    for given in ([], ["--compilation-cache", "off"]):
        with pytest.raises(SystemExit):
            main([*words, *given])
    assert seen == [None, "off"]


def test_the_flag_needs_a_value(capsys):
    with pytest.raises(SystemExit):
        kvjax.cli.main(["info", "builtin:needle", "--compilation-cache"])
    assert "got --compilation-cache without a value" in capsys.readouterr().err
