"""`python -m eval run CONFIG.yaml`: several commands of `python -m eval`, one after the other.

A file says what stands in a table of a paper:

    title: what it is
    model: the model of all runs that name none
    runs:
      - name: llama-64                  # folder of the run, under --out
        command: longbench              # a task, perplexity, latency or lm-eval
        policies: [full, "snapkv:kv_size=64"]
        options: {subsets: [qasper], max_length: 7950, set: {metric: exact_match}}

`options` are the command's own: max_length stands for --max-length, a list for several values, true
for a flag, and `set` for settings of a task. {here} in a text is the file's folder, {scores} the
folder of --scores. See eval/configs.
"""

from __future__ import annotations

import functools
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from tyro.conf import Positional, arg

from kvjax import processes
from kvjax.paths import check_local, local_path

COMMANDS = ("perplexity", "latency", "lm-eval")
"""Commands beside the tasks that a file may name."""

ABOUT = ("title", "paper", "notes", "model", "runs")
RUN = ("name", "command", "model", "policies", "options")


@dataclass(frozen=True)
class RecipeRun:
    """One run of a file.

    Attributes:
        options: of its command.
    """

    name: str
    command: str
    model: str
    policies: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    def argv(self, out: Path | None, data_dir: Path | None = None) -> list[str]:
        """Arguments of `python -m eval`."""
        words = [self.command, "--model", self.model]
        for policy in self.policies:
            words += ["--policy", policy]
        for name, value in self.options.items():
            words += _option(name, value)
        if data_dir is not None and self._reads_data():
            words += ["--data-dir", str(data_dir)]
        return words + (["--out", str(out / self.name)] if out is not None else [])

    def _reads_data(self) -> bool:
        from eval.registry import TASKS, reads
        from eval.task import TaskOptions

        return self.command in TASKS and "data_dir" in reads(self.command, TaskOptions()).options


@dataclass(frozen=True)
class Recipe:
    """A whole file."""

    title: str
    runs: tuple[RecipeRun, ...]


@dataclass(frozen=True)
class RunCommand:
    """Runs what a file says, each into a folder of its own; finished runs are not run again.

    Attributes:
        config: see eval/configs.
        out: folder of the runs' folders.
        model: instead of the file's model, in every run.
        data_dir: folder with the tasks' files, for the tasks that read some.
        scores: folder of head score files, for policies that name {scores}/….
        only: names of runs; all otherwise.
        limit: the first so many items of each subset of a task.
        dry_run: print each command, the memory it takes and its shapes, and stop.
    """

    config: Positional[Annotated[Path, arg(metavar="CONFIG")]]
    out: Path = Path("runs/eval")
    model: str | None = None
    data_dir: Path | None = None
    scores: Path = Path("scores")
    only: tuple[str, ...] = ()
    limit: int | None = None
    dry_run: bool = False


def main(argv: Sequence[str]) -> None:
    """The command with these arguments; a run that fails is reported, and the next begins."""
    command = tyro.cli(RunCommand, prog="python -m eval run", args=list(argv))
    check_local(command)
    recipe = read(command.config, command.scores, command.model)
    runs = [run for run in recipe.runs if not command.only or run.name in command.only]
    missing = set(command.only) - {run.name for run in runs}
    if missing:
        raise ValueError(f"{command.config} has no run {', '.join(sorted(missing))}")
    console = Console(soft_wrap=True, highlight=False, quiet=not processes.is_writer())
    console.print(f"{recipe.title}: {len(runs)} runs", markup=False)
    failed = []
    _weights.cache_clear()
    for run in runs:
        words = run.argv(command.out, command.data_dir)
        if command.limit is not None and run.command not in ("latency", "perplexity"):
            words += ["--limit", str(command.limit)]
        console.print(f"\n$ python -m eval {shlex.join(words)}", markup=False)
        try:
            _do(run, words, command.dry_run, console)
        except (ValueError, NotImplementedError, OSError) as error:
            if processes.several():
                raise  # the others may be waiting in this run
            print(f"eval: error: {run.name}: {' '.join(str(error).split())}", file=sys.stderr)
            failed.append(run.name)
    if failed:
        raise ValueError(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}")


def read(path: Path, scores: Path = Path("scores"), model: str | None = None) -> Recipe:
    """The runs of a file.

    Args:
        scores: stands for {scores}.
        model: instead of every run's.

    Raises:
        ValueError: no such file, an entry that is not understood, or a URL among the paths of
            the runs; says which.
    """
    import yaml

    if not path.is_file():
        raise ValueError(f"no file at {path}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    places = {"{here}": str(path.parent), "{scores}": str(scores)}
    content = _filled(_known(content, ABOUT, str(path)), places)
    entries = content.get("runs")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} has no runs")
    runs = [
        _run(entry, content.get("model"), model, f"{path}, run {i}")
        for i, entry in enumerate(entries, 1)
    ]
    names = [run.name for run in runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{path} has two runs named {', '.join(twice)}")
    return Recipe(str(content.get("title", path.stem)), tuple(runs))


def _run(entry: Any, default: str | None, instead: str | None, where: str) -> RecipeRun:
    from eval.registry import TASKS

    entry = _known(entry, RUN, where)
    lacking = [key for key in ("name", "command") if not isinstance(entry.get(key), str)]
    if lacking:
        raise ValueError(f"{where} lacks {', '.join(lacking)}")
    if entry["command"] not in (*TASKS, *COMMANDS):
        known = ", ".join([*TASKS, *COMMANDS])
        raise ValueError(f"{where}: no command {entry['command']!r}, expected one of {known}")
    model = instead or entry.get("model", default)
    if not isinstance(model, str):
        raise ValueError(f"{where} has no model")
    policies = entry.get("policies", ["full"])
    if not isinstance(policies, list) or not all(isinstance(p, str) for p in policies):
        raise ValueError(f"{where}: policies are {policies!r}, expected a list of texts")
    options = entry.get("options") or {}
    if not isinstance(options, dict):
        raise ValueError(f"{where}: options are {options!r}, expected names and values")
    _check_paths(where, {"model": model, "scores": [_scores(p) for p in policies], **options})
    return RecipeRun(entry["name"], entry["command"], model, tuple(policies), options)


def _check_paths(where: str, value: Any, name: str = "") -> None:
    """Raises ValueError where a text in the value is a URL: no option of a command wants one."""
    if isinstance(value, str):
        local_path(value, f"{where}: {name}")
    elif isinstance(value, list):
        for part in value:
            _check_paths(where, part, name)
    elif isinstance(value, dict):
        for key, part in value.items():
            _check_paths(where, part, str(key))


def _scores(policy: str) -> str:
    """The score file that a policy names, or an empty text."""
    return policy.partition("scores=")[2].partition(",")[0]


def _do(run: RecipeRun, words: list[str], dry: bool, console: Console) -> None:
    from eval.__main__ import dispatch
    from eval.predictions import RESULTS

    if dry:
        from eval.recipe_plan import plan

        for line in plan(run, words):
            console.print(f"  {line}", markup=False)
        return
    out = Path(words[words.index("--out") + 1])
    if (out / RESULTS).exists() and run.command in COMMANDS:
        _check_results(out / RESULTS, run, words)
        console.print(f"  {out / RESULTS} is there already", markup=False)
        return
    dispatch(words[0], words[1:])


def _check_results(path: Path, run: RecipeRun, words: Sequence[str]) -> None:
    """Raises ValueError where a measurement's results are of another command or other weights."""
    from eval.rows import read_json

    results = read_json(path)
    results = results if isinstance(results, dict) else {}
    said = results.get("command")
    held = shlex.split(said)[3:] if isinstance(said, str) else []  # after python -m eval
    if _without_out(held) != _without_out(words):
        raise ValueError(f"{path} is of another command ({said}), expected another --out")
    weights = _weights(run.model, str(run.options.get("dtype", "bfloat16")))
    if results.get("weights") != weights:
        raise ValueError(
            f"{path} is of weights {results.get('weights')}, {run.model} has {weights} now: "
            "expected another --out"
        )


@functools.cache
def _weights(model: str, dtype: str) -> str:
    """Digest of a checkpoint, which is read once for all runs of a file."""
    from kvjax.hf import open_params, read_model
    from kvjax.identity import identity

    return identity(read_model(model).config, open_params(model, dtype)).digest


def _without_out(words: Sequence[str]) -> list[str]:
    """Arguments but the folder, whose path may be written in two ways."""
    at = words.index("--out") if "--out" in words else len(words)
    return [*words[:at], *words[at + 2 :]]


def _option(name: str, value: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if name == "set" and isinstance(value, dict):
        return [word for key, text in value.items() for word in ("--set", f"{key}={text}")]
    if isinstance(value, bool):
        return [flag] if value else []
    values = value if isinstance(value, list) else [value]
    return [flag, *map(str, values)]


def _known(value: Any, names: Sequence[str], where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {value!r:.60}, expected names and values")
    unknown = [str(name) for name in value if name not in names]
    if unknown:
        raise ValueError(f"{where} has {', '.join(unknown)}, expected {', '.join(names)}")
    return value


def _filled(value: Any, places: Mapping[str, str]) -> Any:
    """The value with {here} and {scores} in its texts replaced."""
    if isinstance(value, str):
        for mark, text in places.items():
            value = value.replace(mark, text)
        return value
    if isinstance(value, list):
        return [_filled(part, places) for part in value]
    if isinstance(value, dict):
        return {key: _filled(part, places) for key, part in value.items()}
    return value
