"""Commands that are killed, and commands whose disk is full: is anything good lost?

    python -m benchmarks.faults --out benchmarks/results/faults.json

Each command writes over an older result, or into a new folder. It is killed (SIGKILL) before a
random change of that folder or a moment later, or no file may grow beyond a random size
(RLIMIT_FSIZE), as on a full disk. Afterwards each file of the result must be the old one or the new
one, and the same command must end with the bits of an undisturbed one. Finished faults are kept in
OUT's .jsonl, each with its commit: the same call continues after them.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.disturbed import CALM, Disturbance, changes_file, start
from benchmarks.environment import commit, environment
from benchmarks.fault_commands import COMMANDS, SAVE, Command, write_inputs
from benchmarks.left import arrays, content, lost
from kvjax.runs import append_lines, cut_torn_line, whole_lines, write_json

LEAST = 2000
"""Least limit on a file's size, in bytes: what a command says goes to a file too."""
LATE = 0.1
"""Most seconds between a change and SIGKILL: libraries write some files in C++, between changes."""
CODES = {"kill": (0, -9), "full disk": (0, 2)}
"""Exit codes that a fault may give: a disk may be large enough, a kill may come too late."""


@dataclass(frozen=True)
class Whole:
    """An undisturbed command: what an older one left, what it left, and how.

    Attributes:
        old, new: digests by file.
        arrays: digests of what orbax wrote.
        changes: number of changes of the folder.
        largest: bytes of the largest file.
    """

    old: dict[str, str]
    new: dict[str, str]
    arrays: dict[str, str]
    changes: int
    largest: int


class Bench:
    """Where the commands work: inputs, compiled programs, undisturbed results."""

    def __init__(self, work: Path, commands: Mapping[str, Command] = COMMANDS, **environment: str):
        """Writes the inputs.

        Args:
            environment: variables of the commands.
        """
        self.work, self.commands, self.environment = work, commands, environment
        self.inputs, self.said = work / "inputs", work / "said"
        self.undisturbed: dict[str, Whole] = {}
        write_inputs(self.inputs)

    def run(self, name: str, out: Path, disturbance: Disturbance = CALM, more: str = ""):
        """Runs a command to its end, which may be a bad one, and returns its exit code."""
        latent = self.work / "convert" / "new" / "latent"
        places = {"out": out, "inputs": self.inputs, "latent": latent}
        words = f"{self.commands[name].words} {more}".format(**places).split()
        if name != SAVE:
            words += ["--compilation-cache", str(self.work / "programs")]
        out.mkdir(parents=True, exist_ok=True)
        process = start(words, self.said, out, disturbance, **self.environment)
        process.join()
        return process.exitcode

    def finish(self, name: str, out: Path, more: str = "") -> None:
        code = self.run(name, out, more=more)
        assert code == 0, (name, code, self.said.read_text())

    def whole(self, name: str) -> Whole:
        """An undisturbed command, over an older result where there is one."""
        if name not in self.undisturbed:
            if "{latent}" in self.commands[name].words:
                self.whole("convert")
            self.undisturbed[name] = self._whole(name)
        return self.undisturbed[name]

    def _whole(self, name: str) -> Whole:
        new = self.older(name, "new")
        old = content(new)
        self.finish(name, new)
        sizes = [path.stat().st_size for path in new.rglob("*") if path.is_file()]
        changes = int(changes_file(self.said).read_text())
        return Whole(old, content(new), arrays(new), changes, max(sizes))

    def older(self, name: str, kind: str) -> Path:
        """A new folder with an older result of the command, where it replaces one."""
        out, old = self.work / name / kind, self.work / name / "old"
        shutil.rmtree(out, ignore_errors=True)
        if self.commands[name].older and not old.exists():
            self.finish(name, old, self.commands[name].older)
        old.mkdir(parents=True, exist_ok=True)
        shutil.copytree(old, out)
        return out

    def disturb(self, name: str, out: Path, disturbance: Disturbance) -> dict[str, Any]:
        """Runs a disturbed command and says how it ended and what was lost."""
        whole, code = self.whole(name), self.run(name, out, disturbance)
        said = self.said.read_text()
        line = said.strip().splitlines()[-1:]
        return {
            "exit": code,
            "last line": "".join(line).replace(str(out), "OUT")[:300],
            "lost": lost(content(out), whole.old, whole.new),
            "traceback": "Traceback" in said,
        }

    def same(self, name: str, out: Path) -> bool:
        """Whether the same command ends, and has the bits of an undisturbed one."""
        whole, code = self.whole(name), self.run(name, out)
        return code == 0 and content(out) == whole.new and arrays(out) == whole.arrays

    def fault(self, name: str, fault: str, number: int) -> dict[str, Any]:
        """One fault: what it left, and what the same command makes of that."""
        disturbance = self.drawn(name, fault, number)
        out = self.older(name, "disturbed")
        drawn = {k: v for k, v in vars(disturbance).items() if v != getattr(CALM, k)}
        row = {"command": name, "fault": fault, "number": number, **drawn}
        row |= self.disturb(name, out, disturbance)
        row["same"] = self.same(name, out)
        good = row["same"] and not row["lost"] and not row["traceback"]
        return row | {"good": good and row["exit"] in CODES[fault]}

    def drawn(self, name: str, fault: str, number: int) -> Disturbance:
        """A random fault. Every second kill comes exactly before a change."""
        whole, rng = self.whole(name), random.Random(f"{name} {fault} {number}")
        if fault == "kill":
            delay = round(rng.random() * LATE, 4) if number % 2 else 0.0
            return Disturbance(change=rng.randint(1, whole.changes), delay=delay)
        sizes = math.log(LEAST), math.log(max(2 * LEAST, whole.largest))
        return Disturbance(file_bytes=int(math.exp(rng.uniform(*sizes))))


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
    parser.add_argument("--work", type=Path, help="folder for the commands' outputs, for a while")
    parser.add_argument("--kills", type=int, default=20, help="of each command")
    parser.add_argument("--disks", type=int, default=10, help="full disks of each command")
    args = parser.parse_args(argv)
    log = args.out.with_suffix(".jsonl")
    cut_torn_line(log)
    rows = [json.loads(line) for line in whole_lines(log)]
    made_by = commit()  # once: the checkout may move on meanwhile
    done = {(row["command"], row["fault"], row["number"]) for row in rows}
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        bench = Bench(Path(work))
        for fault in faults(args.kills, args.disks):
            if fault not in done:
                row = bench.fault(*fault) | {"commit": made_by}
                append_lines(log, [row])
                rows.append(row)
                print(json.dumps(row), flush=True)
    counts = Counter(f"{row['command']}, {row['fault']}" for row in rows)
    bad = [row for row in rows if not row["good"]]
    about = environment("benchmarks.faults")
    write_json(args.out, {**about, "faults": counts, "not good": bad, "rows": rows})


if __name__ == "__main__":
    main()
