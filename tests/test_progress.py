"""What a command says while it works: quick stages are silent, slow ones are named."""

import sys
import threading

import jax
import jax.numpy as jnp
import pytest

from kvjax import progress
from kvjax.progress import Lines, progress_bar, seconds, stage, tracked


class Now(threading.Timer):
    """A timer whose time has come when it starts."""

    def start(self):
        self.function()


def test_a_quick_stage_is_silent(capsys):
    with stage("loading"):
        pass
    assert capsys.readouterr().err == ""


def test_a_slow_stage_is_named_while_it_lasts(capsys, monkeypatch):
    monkeypatch.setattr(threading, "Timer", Now)
    with pytest.raises(KeyError), stage("loading it"):
        assert capsys.readouterr().err == "[loading it … "
        raise KeyError
    assert capsys.readouterr().err == "0 s]\n"


def test_only_the_first_end_counts_and_a_late_timer_says_nothing(capsys, monkeypatch):
    monkeypatch.setattr(threading, "Timer", Now)
    late = progress.Stage("reading")
    late.end()
    capsys.readouterr()
    late.end()
    late._name()
    assert capsys.readouterr().err == ""


def test_compiling_is_named():
    with progress.compile_spans() as spans:
        jax.jit(lambda x: x * 3 + 1)(jnp.ones(5))
    assert progress.covered(spans) > 0
    assert seconds(41.2, [(0.0, 3.0), (1.0, 2.0)]) == "41 s, of which 3 s compiling"
    assert seconds(2.6, [(0.0, 0.4)]) == "3 s"


def test_a_log_has_a_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0)
    with progress_bar() as bar:
        assert isinstance(bar, Lines)
        task = bar.add_task("training", total=4, items="")
        bar.update(task, completed=1, items="loss 2.5")
        bar.advance(task)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["[training: 25 %, loss 2.5, 0 s]", "[training: 50 %, loss 2.5, 0 s]"]
    monkeypatch.setattr(progress, "EVERY", 1e9)
    assert list(tracked("abc", "calibrating", 3)) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert not isinstance(progress_bar(), Lines) and not progress_bar().disable
    assert progress_bar(quiet=True).disable
