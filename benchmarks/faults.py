"""Commands that are killed, and commands whose disk is full: is anything good lost?

    python -m benchmarks.faults --out benchmarks/results/faults.json

Each command writes over an older result, or into a new folder. It is killed (SIGKILL) at a random
moment, or no file may grow beyond a random size (RLIMIT_FSIZE), as on a full disk. Afterwards each
file of the result must be the old one or the new one, and the same command must end with the bits
of an undisturbed one. Finished faults are kept in OUT's .jsonl: the same call continues after them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import random
import resource
import runpy
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import environment
from kvjax.runs import append_lines, cut_torn_line, whole_lines, write_json

MODEL = "builtin:needle"
IMPORTS = ["grain", "optax", "orbax.checkpoint", "matplotlib.pyplot", "tyro", "kvjax"]
TIMES = {"seconds", "date", "peak_memory_bytes", "tokens_per_second", "mfu", "computed", "command"}
"""Entries of reports and logs that differ between two runs of the same command."""
UNFINISHED = (".lock", ".part", ".kvjax-part", ".partial.jsonl", "unfinished.safetensors")
"""Ends of names that only an unfinished command leaves."""
GROWING = (".jsonl",)
LEAST = 2000
"""Least limit on a file's size, in bytes: what a command says goes to a file too."""
ENDED = 2
"""Exit code of a command that says what is wrong in lines of its own."""


@dataclass(frozen=True)
class Command:
    """A command line without its output.

    Attributes:
        words: {out} is the output's place, {inputs} the folder of the inputs.
        older: words that are added for an older result, which the command replaces.
    """

    words: str
    older: str = ""


SMALL = "--dtype float32"
COMMANDS = {
    "train": Command(
        "train finetune --model {inputs}/latent --data plain:{inputs}/rows.jsonl --steps 6 "
        "--checkpoint-every 2 --log-every 1 --sequence-length 32 --batch-size 2 --merge "
        f"{SMALL} --out {{out}}/run"
    ),
    "eval": Command(
        f"eval needle --model {MODEL} --policy full --policy snapkv:kv_size=20 --lengths 96 "
        f"--count 4 --batch-size 2 --set depths=2 {SMALL} --out {{out}}/run"
    ),
    "score": Command(
        f"kvjax.cli score {MODEL} {{out}}/heads.json --samples 8 --length 96 {SMALL} "
        "--batch-size 2",
        "--seed 1",
    ),
    "convert": Command(
        f"kvjax.cli convert {MODEL} {{out}}/latent --method decoupled --kv-rank 48 --rope-dim 16 "
        f"--calibration {{inputs}}/rows.npy {SMALL}"
    ),
    "export": Command(f"kvjax.cli export {{inputs}}/exportable {{out}}/export {SMALL}"),
    "save": Command("benchmarks.faults save {out}/model"),
    "compress": Command(
        f"kvjax.cli compress {MODEL} {{inputs}}/text.txt {{out}}/text.kv {SMALL} "
        "--policy snapkv:kv_size=24",
        "--policy full",
    ),
}
SAVE = "save"


def save(out: Path) -> None:
    """The command "save": the embedded model, read and written in the native layout."""
    import kvjax
    from kvjax.endings import endings
    from kvjax.hf.save import is_saved

    with endings("kvjax"):
        if not is_saved(out):
            kvjax.save(*kvjax.load(MODEL, dtype="float32"), out)


# --- Processes ------------------------------------------------------------------------------------


def start(words: Sequence[str], said: Path, cache: Path, file_bytes: int) -> Any:
    """Starts `python -m WORDS…` in a process that is forked from one with all imports."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(IMPORTS)
    process = processes.Process(target=_run, args=(words, said, cache, file_bytes))
    process.start()
    return process


def _run(words: Sequence[str], said: Path, cache: Path, file_bytes: int) -> None:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    with said.open("w") as errors, open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(errors.fileno(), 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))
    module, *sys.argv[1:] = words
    if module == "benchmarks.faults":
        save(Path(sys.argv[-1]))
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def words_of(name: str, out: Path, inputs: Path, more: str = "") -> list[str]:
    places = {"out": str(out), "inputs": str(inputs)}
    return f"{COMMANDS[name].words} {more}".format(**places).split()


# --- What a folder holds --------------------------------------------------------------------------


def content(out: Path) -> dict[str, str]:
    """A digest of every file that a command left, without what differs between equal runs."""
    return {
        str(path.relative_to(out)): digest
        for path in sorted(out.rglob("*"))
        if path.is_file() and (digest := _digest(path))
    }


def _digest(path: Path) -> str | None:
    """None for files of orbax: their names and bytes are new each time. See `arrays`."""
    if {"params", "checkpoints", "damaged"} & set(path.parts):
        return None
    data = path.read_bytes()
    if path.suffix == ".json":
        data = _timeless(json.loads(data))
    elif path.suffix == ".jsonl":  # a kill may tear the last line
        data = b"\n".join(_timeless(json.loads(line)) for line in whole_lines(path))
    elif path.suffix == ".png":
        data = b""
    return hashlib.sha256(data).hexdigest()[:12]


def _timeless(value: Any) -> bytes:
    return json.dumps(_without_times(value), sort_keys=True).encode()


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_times(v) for k, v in value.items() if k not in TIMES}
    return [_without_times(v) for v in value] if isinstance(value, list) else value


def arrays(out: Path) -> dict[str, str]:
    """A digest of the parameters of every model in the native layout, and of the checkpoints."""
    import kvjax
    from kvjax.identity import identity
    from train.checkpoints import finished_steps

    found = {}
    for config in sorted(out.rglob("kvjax.json")):
        model, params = kvjax.load(config.parent, dtype="float32")
        found[str(config.parent.relative_to(out))] = identity(model.config, params).digest
    for run in sorted(path.parent for path in out.rglob("checkpoints")):
        found[str(run.relative_to(out))] = str(finished_steps(run))
    return found


def lost(now: dict[str, str], old: dict[str, str], new: dict[str, str]) -> list[str]:
    """Names of files that are neither old nor new. Files that grow and leftovers do not count."""
    return [
        name
        for name, digest in now.items()
        if not name.endswith((*UNFINISHED, *GROWING))
        and not any(part.endswith(UNFINISHED) for part in Path(name).parts)
        and digest not in (old.get(name), new.get(name))
    ] + [name for name in old if name not in now]


# --- Faults ---------------------------------------------------------------------------------------


@dataclass
class Bench:
    """Where the commands work: inputs, compiled programs, undisturbed results."""

    work: Path

    def __post_init__(self) -> None:
        self.inputs, self.cache, self.said = (self.work / n for n in ("inputs", "cache", "said"))
        self.undisturbed: dict[str, dict[str, Any]] = {}

    def run(self, name: str, out: Path, more: str = "") -> float:
        """Runs a command to its end and returns its seconds."""
        begun = time.monotonic()
        process = self.start(name, out, more=more)
        process.join()
        assert process.exitcode == 0, (name, process.exitcode, self.said.read_text())
        return time.monotonic() - begun

    def start(self, name: str, out: Path, limit: int = resource.RLIM_INFINITY, more: str = ""):
        out.mkdir(parents=True, exist_ok=True)
        return start(words_of(name, out, self.inputs, more), self.said, self.cache, limit)

    def whole(self, name: str) -> dict[str, Any]:
        """What an undisturbed command leaves, what an older one left, and its seconds."""
        if name not in self.undisturbed:
            old, new = self.fresh(name, "old"), self.fresh(name, "new")
            if COMMANDS[name].older:
                self.run(name, old, COMMANDS[name].older)
            self.run(name, new)  # compiles
            shutil.rmtree(new)
            seconds = self.run(name, new)
            sizes = [path.stat().st_size for path in new.rglob("*") if path.is_file()]
            found = {"seconds": seconds, "largest": max(sizes), "old": content(old)}
            self.undisturbed[name] = found | {"new": content(new), "arrays": arrays(new)}
        return self.undisturbed[name]

    def fresh(self, name: str, kind: str) -> Path:
        out = self.work / name / kind
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        return out

    def fault(self, name: str, fault: str, number: int) -> dict[str, Any]:
        """One fault: what it left, and what the same command makes of that."""
        whole, rng = self.whole(name), random.Random(f"{name} {fault} {number}")
        out = self.fresh(name, "disturbed")
        if COMMANDS[name].older:
            shutil.copytree(self.work / name / "old", out, dirs_exist_ok=True)
        row: dict[str, Any] = {"command": name, "fault": fault, "number": number}
        if fault == "kill":
            process, after = self.start(name, out), rng.random() * whole["seconds"]
            process.join(after)
            process.kill()
            process.join()
            row |= {"seconds": round(after, 3)}
        else:
            sizes = math.log(LEAST), math.log(max(2 * LEAST, whole["largest"]))
            limit = int(math.exp(rng.uniform(*sizes)))
            process = self.start(name, out, limit)
            process.join()
            row |= {"file_bytes": limit}
        row |= {"exit": process.exitcode, "last line": last_line(self.said, out)}
        now = content(out)
        row["lost"] = lost(now, whole["old"], whole["new"])
        row["traceback"] = "Traceback" in self.said.read_text()
        again = self.start(name, out)
        again.join()
        same = content(out) == whole["new"] and arrays(out) == whole["arrays"]
        row |= {"again": again.exitcode, "same": same}
        codes = (0, -9) if fault == "kill" else (0, ENDED)
        good = same and not row["lost"] and not row["traceback"] and not again.exitcode
        return row | {"good": good and process.exitcode in codes}


def last_line(said: Path, out: Path) -> str:
    lines = said.read_text().strip().splitlines()
    return lines[-1].replace(str(out), "OUT")[:300] if lines else ""


def make_inputs(bench: Bench) -> None:
    """Rows to train on, ids and a text to read, and two converted models."""
    if (bench.inputs / "done").exists():
        return
    from kvjax.tasks.families import rows

    shutil.rmtree(bench.inputs, ignore_errors=True)
    bench.inputs.mkdir(parents=True)
    lines = [json.dumps(row) + "\n" for row in rows("word_problems", 120, 0)]
    (bench.inputs / "rows.jsonl").write_text("".join(lines))
    ids = np.random.default_rng(0).integers(5, 200, (8, 32)).astype(np.int32)
    np.save(bench.inputs / "rows.npy", ids)
    (bench.inputs / "text.txt").write_text("the red fox runs . " * 30)
    for folder, more in (("latent", ""), ("exportable", "--exportable")):
        place = bench.work / "made"
        shutil.rmtree(place, ignore_errors=True)
        bench.run("convert", place, more)
        shutil.move(place / "latent", bench.inputs / folder)
    (bench.inputs / "done").touch()


def faults(kills: int, disks: int) -> Iterator[tuple[str, str, int]]:
    """The faults in an order in which every command has some early."""
    for number in range(max(kills, disks)):
        for name in COMMANDS:
            if number < kills:
                yield name, "kill", number
            if number < disks:
                yield name, "full disk", number


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "kvjax-faults")
    parser.add_argument("--kills", type=int, default=20, help="of each command")
    parser.add_argument("--disks", type=int, default=10, help="full disks of each command")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    bench, log = Bench(args.work), args.out.with_suffix(".jsonl")
    make_inputs(bench)
    cut_torn_line(log)
    rows = [json.loads(line) for line in whole_lines(log)]
    done = {(row["command"], row["fault"], row["number"]) for row in rows}
    for fault in faults(args.kills, args.disks):
        if fault not in done:
            row = bench.fault(*fault)
            append_lines(log, [row])
            rows.append(row)
            print(json.dumps(row), flush=True)
    counts = Counter(f"{row['command']}, {row['fault']}" for row in rows)
    bad = [row for row in rows if not row["good"]]
    about = environment("benchmarks.faults")
    write_json(args.out, {**about, "faults": counts, "not good": bad, "rows": rows})


if __name__ == "__main__":
    main()
