"""One writer an output, and the ends of commands: bad input, Ctrl-C and SIGTERM."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import several

import eval.__main__
import train.__main__
from kvjax import cli
from kvjax.endings import GOES_ON, Terminated, endings, only_writer
from kvjax.fields import Problems

MAINS = {"kvjax": cli.main, "eval": eval.__main__.main, "train": train.__main__.main}


def test_a_second_writer_is_told_who_holds_the_output(tmp_path):
    out = tmp_path / "scores.json"
    with only_writer(out):
        held = rf"scores.json is being written by process {os.getpid()} on {socket.gethostname()}"
        with pytest.raises(ValueError, match=held), only_writer(out):
            pass
        with only_writer(tmp_path / "other.json"):
            pass
    assert not list(tmp_path.iterdir())
    with only_writer(out):
        pass


MODEL = "builtin:needle"


@pytest.mark.parametrize(
    "command",
    [
        f"kvjax score {MODEL} OUT --samples 1",
        f"kvjax convert {MODEL} OUT",
        f"kvjax export {MODEL} OUT",
        f"kvjax compress {MODEL} text OUT",
        "kvjax demo --out OUT",
        f"eval needle --model {MODEL} --lengths 96 --count 1 --set depths=1 --out OUT",
        f"eval perplexity --model {MODEL} --text text --out OUT",
        f"eval latency --model {MODEL} --out OUT",
        f"train finetune --model {MODEL} --data plain:rows --out OUT",
        "train pretrain --config train/pretrain/needle.yaml --out OUT",
        "train compare --out OUT",
    ],
)
def test_a_command_refuses_an_output_that_another_process_writes(
    tmp_path, monkeypatch, capsys, command
):
    monkeypatch.chdir(Path(__file__).parents[1])
    out = tmp_path / "out"
    name, *words = command.replace("OUT", str(out)).split()
    with only_writer(out), pytest.raises(SystemExit, match="2"):
        MAINS[name](words)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"process {os.getpid()}" in said
    assert not list(tmp_path.iterdir())


def test_a_refused_command_leaves_no_empty_folders(tmp_path):
    with pytest.raises(ValueError, match="no model"), only_writer(tmp_path / "a" / "b" / "run"):
        raise ValueError("no model")
    assert not list(tmp_path.iterdir())


def test_a_lock_that_names_no_process_says_what_to_do(tmp_path):
    lock = tmp_path / "run.lock"
    lock.touch()
    told = f"another process: {lock} names none; if no other command runs, remove that file"
    with pytest.raises(ValueError, match=re.escape(told)), only_writer(tmp_path / "run"):
        pass
    lock.unlink()
    with only_writer(tmp_path / "run"):
        pass


def test_the_lock_of_a_process_that_is_gone_is_taken_over(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    lock = tmp_path / "run.lock"
    lock.write_text(f"{gone.pid}\n{socket.gethostname()}\n")
    os.utime(lock, (0, 0))
    with only_writer(tmp_path / "run"):
        assert lock.read_text().startswith(f"{os.getpid()}\n")
    assert not lock.exists()


def test_notes_are_for_signals_only(tmp_path):
    for kind, notes in ((KeyboardInterrupt, [GOES_ON]), (Terminated, [GOES_ON]), (KeyError, [])):
        with pytest.raises(kind) as caught, only_writer(tmp_path / "run", GOES_ON):
            raise kind
        assert getattr(caught.value, "__notes__", []) == notes


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("got 3,\n   expected 4"), 2, "kvjax: error: got 3, expected 4\n"),
        (OSError("no space"), 2, "kvjax: error: no space\n"),
        (NotImplementedError("rings"), 2, "kvjax: error: rings\n"),
        (KeyboardInterrupt(), 130, "kvjax: stopped by SIGINT\n"),
    ],
)
def test_each_end_has_a_line_and_a_code(capsys, error, code, line):
    with pytest.raises(SystemExit) as caught, endings("kvjax"):
        raise error
    assert caught.value.code == code
    assert capsys.readouterr().err == line


def test_each_problem_has_a_line(capsys):
    with pytest.raises(SystemExit, match="2"), endings("kvjax"):
        raise Problems(["a.json: x is 1,\n expected 2", "a.json: y is missing"])
    said = capsys.readouterr().err
    assert said == "kvjax: error: a.json: x is 1, expected 2\nkvjax: error: a.json: y is missing\n"


def test_reports_to_a_closed_loop_are_silent_even_after_the_command(monkeypatch):
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", lambda failed: heard.append(str(failed.exc_value)))
    for _ in range(2):
        with endings("kvjax"):
            pass
    for message in ("Event loop is closed", "another"):
        sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError(message)))
    assert heard == ["another"]


def test_our_own_errors_keep_their_tracebacks():
    with pytest.raises(KeyError), endings("kvjax"):
        raise KeyError("a bug")


def test_sigterm_cleans_up_and_says_what_is_saved(capsys, tmp_path):
    with (
        pytest.raises(SystemExit) as caught,
        endings("train"),
        only_writer(tmp_path / "a", GOES_ON),
    ):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    assert caught.value.code == 143
    assert capsys.readouterr().err == f"train: stopped by SIGTERM; {GOES_ON}\n"
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_handler_that_was_there_stays(monkeypatch):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with endings("kvjax"):
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads_set_no_handlers():
    found = []
    worker = threading.Thread(target=lambda: found.extend(_handler_inside()))
    worker.start()
    worker.join()
    assert found == [signal.SIG_DFL]


def _handler_inside():
    with endings("kvjax"):
        yield signal.getsignal(signal.SIGTERM)


def test_a_stopped_command_goes_on(tmp_path, capsys):
    """Two at once, and SIGTERM between two batches: one line, no lock, and the rest is measured."""
    out, said = tmp_path / "heads.json", tmp_path / "said"
    words = ["kvjax.cli", "score", "builtin:needle", out, "--samples", 12, "--length", 128]
    words += ["--batch-size", 2, "--dtype", "float32"]
    process, partial = several.start(words, said), tmp_path / "heads.partial.jsonl"
    deadline = time.monotonic() + 120
    while not partial.exists() or partial.read_text().count("\n") < 2:
        assert process.is_alive() and time.monotonic() < deadline, said.read_text()
        time.sleep(0.05)
    with pytest.raises(SystemExit, match="2"):
        cli.main(list(map(str, words[1:])))
    assert f"is being written by process {process.pid} on" in capsys.readouterr().err
    os.kill(process.pid, signal.SIGTERM)
    assert several.ended(process, 60) == 143
    assert said.read_text() == f"kvjax: stopped by SIGTERM; {GOES_ON}\n"
    assert {path.name for path in tmp_path.iterdir()} == {"said", partial.name}
    done = partial.read_text().count("\n") - 1
    assert 1 <= done < 6
    cli.main(list(map(str, words[1:])))
    assert out.is_file() and not partial.exists()
