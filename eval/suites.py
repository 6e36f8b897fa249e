"""`python -m eval run FILE.yaml`: a suite, several commands of `python -m eval` in one file.

A suite describes a table of a paper:

    title: name of the table
    model: the model of all runs that name none
    runs:
      - name: llama-64                  # folder of the run, under --out
        command: longbench              # a task, perplexity, latency or lm-eval
        policies: [full, "snapkv:kv_size=64"]
        options: {subsets: [qasper], max_length: 7950, set: {metric: exact_match}}

`options` are the command's options: max_length stands for --max-length. A list gives several
values, true sets a flag, and `set` holds settings of a task. {here} in a text is the file's folder,
{scores} the folder of --scores. See eval/configs.
"""

from __future__ import annotations

import dataclasses
import functools
import shlex
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Len
from rich.console import Console
from tyro.conf import Positional, arg

from eval import latency, lm_eval, perplexity
from eval.command import TaskCommand, run_command
from eval.predictions import RESULTS
from eval.preview import preview
from eval.task import TASKS, TaskOptions, reads_of
from kvjax import processes
from kvjax.endings import error_lines, say
from kvjax.fields import Name, Object, OneOf, Text, build, shown
from kvjax.paths import check_local, is_inside, local_path
from kvjax.text_files import read_object, read_yaml
from kvjax.usage import parsed

MEASUREMENTS = {
    "perplexity": (perplexity.PerplexityCommand, perplexity.run),
    "latency": (latency.LatencyCommand, latency.run),
    "lm-eval": (lm_eval.HarnessCommand, lm_eval.run),
}
"""Commands besides the tasks: the dataclass of their settings, and what runs them."""

GIVEN = ("model", "policy", "out")
"""Fields of a command that no option sets: the run's own entries and --out do."""
ALIASES = {"set": "settings", "json": "json_file"}
"""Options whose field has another name."""


@dataclass(frozen=True)
class Entry:
    """A run in a file; see the head of this module."""

    name: Name
    command: Annotated[str, OneOf((*TASKS, *MEASUREMENTS))]
    model: Name | None = None
    policies: tuple[Text, ...] = ("full",)
    options: Object | None = None


@dataclass(frozen=True)
class Content:
    """What a file holds."""

    runs: Annotated[tuple[Entry, ...], Len(1)]
    title: Text | None = None
    paper: Text | None = None
    notes: Text | None = None
    model: Name | None = None


@dataclass(frozen=True)
class SuiteRun:
    """One run of a suite.

    Attributes:
        options: of its command.
        where: file and run, for errors.
    """

    name: str
    command: str
    model: str
    policies: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""

    def build(
        self, out: Path | None, data_dir: Path | None = None, limit: int | None = None
    ) -> Any:
        """The settings of the run's command, such as a `TaskCommand`.

        Args:
            out: folder of the suite's runs.
            data_dir: for a task that reads one.
            limit: instead of the run's own, for a task or lm-eval.

        Raises:
            ValueError: an option that the command does not have, or a value of another type.
        """
        kind = MEASUREMENTS.get(self.command, (TaskCommand,))[0]
        values = {
            "model": self.model,
            "policy": self.policies,
            "out": None if out is None else out / self.name,
        }
        options = {**self.options, **self._overrides(data_dir, limit)}
        return _build(kind, values, options, f"{self.where or self.name}: {self.command}")

    def argv(
        self, out: Path | None, data_dir: Path | None = None, limit: int | None = None
    ) -> list[str]:
        """The same command as arguments of `python -m eval`, for messages and results.json."""
        words = [self.command, "--model", self.model]
        for policy in self.policies:
            words += ["--policy", policy]
        overrides = self._overrides(data_dir, limit)
        for name, value in self.options.items():
            words += [] if name in overrides else _flag(name, value)
        if "data_dir" in overrides:
            words += _flag("data_dir", overrides.pop("data_dir"))
        words += [] if out is None else ["--out", str(out / self.name)]
        return words + [word for pair in overrides.items() for word in _flag(*pair)]

    def _overrides(self, data_dir: Path | None, limit: int | None) -> dict[str, Any]:
        """Options of `python -m eval run` that the run's command has too."""
        found: dict[str, Any] = {}
        reads = reads_of(self.command, TaskOptions()).options if self.command in TASKS else ()
        if data_dir is not None and "data_dir" in reads:
            found["data_dir"] = str(data_dir)
        if limit is not None and self.command not in ("latency", "perplexity"):
            found["limit"] = limit
        return found


@dataclass(frozen=True)
class Suite:
    """A whole file."""

    title: str
    runs: tuple[SuiteRun, ...]


@dataclass(frozen=True)
class RunCommand:
    """Runs a suite, each run into its own folder. Finished runs are not repeated.

    Attributes:
        config: the suite's file, see eval/configs.
        out: folder of the runs' folders.
        model: the model of every run, instead of the file's.
        data_dir: folder with the tasks' files, for tasks that read files.
        scores: folder of head score files, for policies that name {scores}/….
        only: names of the runs to do; all by default.
        limit: number of items of each subset of a task.
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
    """Parses the arguments and does the runs. A run that fails is reported, and the next begins."""
    command = parsed(RunCommand, "python -m eval run", argv)
    check_local(command)
    suite = read(command.config, command.scores, command.model)
    runs = [run for run in suite.runs if not command.only or run.name in command.only]
    missing = set(command.only) - {run.name for run in runs}
    if missing:
        raise ValueError(f"{command.config} has no run {', '.join(sorted(missing))}")
    console = Console(soft_wrap=True, highlight=False, quiet=not processes.is_writer())
    console.print(f"{suite.title}: {len(runs)} runs", markup=False)
    failed = []
    # The checkpoint may have changed since an earlier call in this process.
    _weights.cache_clear()
    for run in runs:
        places = command.out, command.data_dir, command.limit
        words = run.argv(*places)
        console.print(f"\n$ python -m eval {shlex.join(words)}", markup=False)
        try:
            _do(run, run.build(*places), words, command.dry_run, console)
        except (ValueError, NotImplementedError, OSError) as error:
            if processes.several():
                raise  # the other processes may be waiting in this run
            for line in error_lines(error):
                say(f"eval: error: {run.name}: {line}")
            failed.append(run.name)
    if failed:
        raise ValueError(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}")


def _do(run: SuiteRun, command: Any, words: list[str], dry: bool, console: Console) -> None:
    """Runs one command, or prints its preview."""
    if dry:
        for line in preview(run.command, command):
            console.print(f"  {line}", markup=False)
    elif run.command in TASKS:
        run_command(run.command, command, words)
    elif (command.out / RESULTS).exists():
        _check_results(command.out / RESULTS, command, words)
        console.print(f"  {command.out / RESULTS} already exists", markup=False)
    elif processes.is_writer():
        MEASUREMENTS[run.command][1](command, words)


def _check_results(path: Path, command: Any, words: Sequence[str]) -> None:
    """Raises ValueError where a measurement's results are of another command or other weights."""
    results = read_object(path)
    said = results.get("command")
    held = shlex.split(said)[3:] if isinstance(said, str) else []  # after python -m eval
    if _without_out(held) != _without_out(words):
        raise ValueError(f"{path} is of another command ({said}), expected another --out")
    weights = _weights(command.model, command.dtype)
    if results.get("weights") != weights:
        raise ValueError(
            f"{path} is of weights {results.get('weights')}, {command.model} has {weights} now: "
            "expected another --out"
        )


@functools.cache
def _weights(model: str, dtype: str) -> str:
    """Digest of a checkpoint, which is read once for all runs of a file."""
    from kvjax.hf import open_params, read_model
    from kvjax.identity import identity

    return identity(read_model(model).config, open_params(model, dtype)).digest


def _without_out(words: Sequence[str]) -> list[str]:
    """Arguments without the folder, whose path may be written in two ways."""
    at = words.index("--out") if "--out" in words else len(words)
    return [*words[:at], *words[at + 2 :]]


def read(path: Path, scores: Path = Path("scores"), model: str | None = None) -> Suite:
    """The runs of a file.

    Args:
        scores: the folder that {scores} stands for.
        model: the model of every run, instead of the file's.

    Raises:
        ValueError: no such file, an unknown or wrong entry, or a URL among the paths of the runs.
    """
    # Places are filled in first, so that every check sees real paths.
    places = {"{here}": str(path.parent), "{scores}": str(scores)}
    content = build(Content, _filled(read_yaml(path, "eval"), places), str(path))
    runs = [
        _run(entry, model or entry.model or content.model, f"{path}, run {i}")
        for i, entry in enumerate(content.runs, 1)
    ]
    names = [run.name for run in runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{path} has two runs named {', '.join(twice)}")
    return Suite(content.title or path.stem, tuple(runs))


def _run(entry: Entry, model: str | None, where: str) -> SuiteRun:
    if model is None:
        raise ValueError(f"{where} has no model")
    if not is_inside(entry.name):  # it names a folder below --out
        raise ValueError(f"{where}: name is {shown(entry.name)}, expected one of a folder in --out")
    options = entry.options or {}
    scores = [_scores(policy) for policy in entry.policies]
    _check_paths(where, {"model": model, "scores": scores, **options})
    where = f"{where}, {entry.name}"
    return SuiteRun(entry.name, entry.command, model, entry.policies, options, where)


def _check_paths(where: str, value: Any, name: str = "") -> None:
    """Raises ValueError where a text in the value is a URL: no option of a command takes one."""
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


def _flag(name: str, value: Any) -> list[str]:
    """An option as arguments."""
    flag = f"--{name.replace('_', '-')}"
    if name == "set" and isinstance(value, dict):
        return [word for key, text in value.items() for word in ("--set", f"{key}={text}")]
    if isinstance(value, bool):
        return [flag] if value else []
    values = value if isinstance(value, list) else [value]
    return [flag, *map(str, values)]


def _build(kind: type, values: dict[str, Any], options: Mapping[str, Any], where: str) -> Any:
    """A dataclass from the values of some fields and the options of a file.

    Args:
        kind: the dataclass.
        where: file, run and command, for errors.

    Raises:
        ValueError: an unknown option, a value of another type, or a missing option.
    """
    # Without tyro's markers: the plain types of the fields.
    types_of = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind) if f.name not in GIVEN}
    flags = {name: option for option, name in ALIASES.items()}
    names = [flags.get(name, name) for name in fields]
    for option, value in options.items():
        option = option.replace("-", "_")
        if option not in names:
            raise ValueError(f"{where} has no option {option}, expected one of {', '.join(names)}")
        if option == "set" and isinstance(value, dict):
            # Settings of a task are KEY=VALUE texts, as with --set.
            value = [f"{key}={text}" for key, text in value.items()]
        name = ALIASES.get(option, option)
        try:
            values[name] = _as_type(value, types_of[name])
        except (TypeError, ValueError):
            wanted = _type_name(types_of[name])
            raise ValueError(f"{where}: {option} is {shown(value)}, expected {wanted}") from None
    # YAML may leave out what the command line insists on.
    required = [name for name, f in fields.items() if f.default is dataclasses.MISSING]
    lacking = [flags.get(name, name) for name in required if name not in values]
    if lacking:
        raise ValueError(f"{where} lacks {', '.join(lacking)}")
    return kind(**values)


def _as_type(value: Any, kind: Any) -> Any:
    """A value of YAML as the type of a field; one value stands for a list of one.

    Raises:
        TypeError, ValueError: the value does not have this type.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        kinds = [part for part in inner if part is not type(None)]
        # null stands for the default of an optional field.
        return None if value is None else _as_type(value, kinds[0])
    if origin is tuple:
        return tuple(_as_type(part, inner[0]) for part in _as_list(value))
    if origin is typing.Literal:
        if value not in inner:
            raise ValueError
        return value
    # Python's bool is an int, and int() would cut 2.5 to 2.
    simple = isinstance(value, (str, int, float))
    wrong_number = kind is int and isinstance(value, float)
    if not simple or wrong_number or isinstance(value, bool) != (kind is bool):
        raise TypeError
    return kind(value)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _type_name(kind: Any) -> str:
    """A field's type in an error."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return f"{_type_name(inner[0])}, or null"
    if origin is tuple:
        return f"{_type_name(inner[0])}, or a list of these"
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, inner))}"
    names = {int: "a whole number", float: "a number", bool: "true or false", Path: "a path"}
    return names.get(kind, "text")
