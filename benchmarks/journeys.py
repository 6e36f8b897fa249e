"""How many files of the project one job runs through: what a reader opens to follow it.

    python -m benchmarks.journeys [NAME ...] [--out benchmarks/results/journeys.json]

Each journey is one call on the embedded model, on CPU, in a process of its own, so that nothing is
traced or cached beforehand. `sys.setprofile` sees every call of a Python function in the main
thread. A file of kvjax, pallas_kernels, train or eval counts when one of its functions runs, in the
order of first calls. What runs while a module is imported does not count, nor do methods that
`dataclasses` and `NamedTuple` write. Programs are traced by the counted call, so the functions
inside of them count. On CPU the attention of a head-budgeted cache is pallas_kernels/xla.py. An
accelerator runs the files of pallas_kernels/tpu or gpu instead, which no journey counts.
"""

from __future__ import annotations

import argparse
import inspect
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

import eval.__main__
import kvjax
import kvjax.cli
import train.__main__
from benchmarks.environment import environment

ROOT = Path(kvjax.__file__).parents[1]
PACKAGES = ("kvjax", "pallas_kernels", "train", "eval")
MODEL = "builtin:needle"
QUIET = ["--compilation-cache", "off"]


@dataclass(frozen=True)
class Journey:
    """One job.

    Attributes:
        prepare: a folder for files → the call to count. What `prepare` does is not counted.
        goal: files at most.
        package: the goal is for the files of this package alone; "" for all packages.
    """

    prepare: Callable[[Path], Callable[[], Any]]
    goal: int
    package: str = ""


class Followed:
    """The functions that run between `start` and `stop`.

    Attributes:
        functions: {file: [function, ...]}, both in the order of the first call.
        moves: changes from one file to another between functions that run for the first time.
    """

    def __init__(self) -> None:
        self.functions: dict[str, list[str]] = {}
        self.moves = 0
        self._seen: set[CodeType] = set()
        self._last = ""
        self._imports = 0  # module bodies under way

    def start(self) -> None:
        sys.setprofile(self._on_event)

    def stop(self) -> None:
        sys.setprofile(None)

    def _on_event(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if code.co_name == "<module>":
            self._imports += {"call": 1, "return": -1}.get(event, 0)
        elif event == "call" and self._imports == 0 and code not in self._seen:
            self._seen.add(code)
            if code.co_flags & inspect.CO_OPTIMIZED:  # class bodies are no functions and lack it
                self._enter(code)

    def _enter(self, code: CodeType) -> None:
        path = Path(code.co_filename)
        if not path.is_relative_to(ROOT) or path.relative_to(ROOT).parts[0] not in PACKAGES:
            return
        file = str(path.relative_to(ROOT))
        self.functions.setdefault(file, []).append(code.co_qualname)
        self.moves += self._last not in ("", file)
        self._last = file


def one_token(policy: str) -> Callable[[Path], Callable[[], Any]]:
    """A prompt of 64 tokens, the token that it predicts, and one step of decoding."""

    def prepare(folder: Path) -> Callable[[], Any]:
        model, params = kvjax.load(MODEL, dtype="float32")
        prompt = list(range(5, 69))
        return lambda: kvjax.generate(model, params, [prompt], max_new_tokens=2, policy=policy)

    return prepare


def load(folder: Path) -> Callable[[], Any]:
    path = str(ROOT / "kvjax" / "builtin" / "needle")
    return lambda: kvjax.load(path, dtype="float32")


SIZES = {"kv_rank": 48, "rope_dim": 16}


def calibration_rows() -> np.ndarray:
    return np.random.default_rng(0).integers(5, 200, (8, 32)).astype(np.int32)


def convert_in_memory(folder: Path) -> Callable[[], Any]:
    model, params = kvjax.load(MODEL, dtype="float32")

    def job() -> None:
        stats = kvjax.transmla.calibrate(model, params, [calibration_rows()])
        kvjax.transmla.convert(model, params, method="decoupled", stats=stats, **SIZES)

    return job


def convert_on_disk(folder: Path) -> Callable[[], Any]:
    np.save(folder / "rows.npy", calibration_rows())
    options = ["--method", "decoupled", "--calibration", str(folder / "rows.npy")]
    for name, value in SIZES.items():
        options += [f"--{name.replace('_', '-')}", str(value)]
    return lambda: kvjax.cli.main(["convert", MODEL, str(folder / "out"), *options, *QUIET])


def score(folder: Path) -> Callable[[], Any]:
    options = ["--samples", "8", "--length", "128", *QUIET]
    return lambda: kvjax.cli.main(["score", MODEL, str(folder / "heads.json"), *options])


def training_row(folder: Path) -> Callable[[], Any]:
    """`train finetune` for one step on one batch."""
    rows = [{"query": f"{n} and {n}", "response": "copper violin"} for n in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = (
        f"--model {MODEL} --data plain:{folder}/rows.jsonl --sequence-length 16 --batch-size 2"
    )
    more = f"--steps 1 --dtype float32 --out {folder}/run"
    return lambda: train.__main__.main(["finetune", *options.split(), *more.split(), *QUIET])


def eval_row(folder: Path) -> Callable[[], Any]:
    """`eval needle` with two examples under one policy."""
    options = f"--model {MODEL} --policy snapkv:kv_size=20 --lengths 128 --count 1 --set depths=2"
    more = f"--dtype float32 --out {folder}/run"
    return lambda: eval.__main__.main(["needle", *options.split(), *more.split(), *QUIET])


JOURNEYS = {
    "one token, full": Journey(one_token("full"), 16),
    "one token, headkv": Journey(one_token("headkv:kv_size=24"), 24),
    "load": Journey(load, 12),
    "convert decoupled, in memory": Journey(convert_in_memory, 14),
    "convert decoupled, on disk": Journey(convert_on_disk, 30),
    "score": Journey(score, 18),
    "training row": Journey(training_row, 17, "train"),
    "eval row": Journey(eval_row, 9, "eval"),
}


def follow(name: str) -> dict[str, Any]:
    """Runs one journey in this process and says what it went through."""
    journey, followed = JOURNEYS[name], Followed()
    with tempfile.TemporaryDirectory() as folder:
        job = journey.prepare(Path(folder))
        followed.start()
        try:
            job()
        finally:
            followed.stop()
    own = [file for file in followed.functions if file.startswith(journey.package)]
    return {
        "journey": name,
        "counted": journey.package or "all",
        "goal": journey.goal,
        "files": len(own),
        "files_of_all_packages": len(followed.functions),
        "moves": followed.moves,
        "functions": {file: len(names) for file, names in followed.functions.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(JOURNEYS)}")
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    args = parser.parse_args()
    facts = environment("benchmarks.journeys", ("jax", "flax"))
    rows = []
    for name in args.names or JOURNEYS:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn) as process:  # a new process for each journey
            rows.append(process.submit(follow, name).result())
        found = rows[-1]
        print(
            f"{name}: {found['files']} files (goal {found['goal']}), "
            f"{found['files_of_all_packages']} of all packages, {found['moves']} moves"
        )
    if args.out is not None:
        what = "files whose functions run during one job, and how many functions of each"
        args.out.write_text(json.dumps({"what": what, "rows": rows, **facts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
