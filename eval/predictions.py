"""The folder of a run: config.json describes the run, predictions.jsonl holds finished answers.

Of several processes, process 0 writes predictions.jsonl and each other one its own file,
predictions.1.jsonl and so forth. Their lines move into predictions.jsonl when all processes have
finished, or when the run is started again.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from kvjax import processes, runs
from kvjax.fields import (
    Bytes,
    Flag,
    Name,
    Share,
    Size,
    Text,
    field_problems,
    hints,
    object_problems,
    refuse,
    shown,
)
from kvjax.runs import write_json
from kvjax.text_files import parse_object

CONFIG, PREDICTIONS, RESULTS = "config.json", "predictions.jsonl", "results.json"


@dataclass(frozen=True)
class Prediction:
    """One answer under one policy: a line of predictions.jsonl.

    Attributes:
        prompt_tokens: number of tokens that the model read.
        truncated: whether the prompt was cut.
        text: the answer, cut at the task's stops; None where the right answer was teacher-forced.
        score: 0 to 1.
        cache_bytes, full_cache_bytes: of one sequence after prefill, see `kvjax.Generation`.
    """

    id: Name
    group: Text
    policy: Name
    prompt_tokens: Size
    truncated: Flag
    text: Text | None
    score: Share
    cache_bytes: Bytes
    full_cache_bytes: Bytes


FIELDS = hints(Prediction)


class RunFolder:
    """Predictions of one run, on disk and in memory. Opening the folder again continues the run.

    Attributes:
        done: (policy, id) → prediction.
    """

    def __init__(
        self, path: Path, request: dict[str, Any], groups: Mapping[str, str] | None = None
    ):
        """Opens the folder and makes it where it is missing.

        Args:
            request: JSON values that the predictions depend on, for config.json.
            groups: the group of every item by id; predictions of other items are refused. None:
                predictions of any item are taken.

        Raises:
            ValueError: the folder holds another run, or a file that is damaged.
        """
        self.path, self._groups = path, groups
        self._policies = request.get("policies")
        processes.on_writer(lambda: self._prepare(request))
        self.done = self._read()
        # All processes must have read the file before any of them appends to it.
        processes.barrier("predictions read")
        writer = processes.is_writer()
        self._own = path / (PREDICTIONS if writer else f"predictions.{jax.process_index()}.jsonl")

    def finish(self) -> None:
        """Waits for all processes and collects their predictions in one file and in memory."""
        if processes.several():
            processes.barrier("predictions")
            processes.on_writer(self._gather)
            self.done = self._read()

    def _prepare(self, request: dict[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        config = self.path / CONFIG
        if config.exists():
            check_same(config, request)
        # Predictions of unknown settings must not be mixed with new ones.
        elif (self.path / PREDICTIONS).exists():
            raise ValueError(f"{self.path} holds {PREDICTIONS} without {CONFIG}, expected both")
        else:
            write_json(config, request)
        self._gather()

    def _gather(self) -> None:
        for part in sorted(self.path.glob("predictions.*.jsonl")):
            there, found = self._read(), read(part, self._policies, self._groups)
            # A kill between append and unlink leaves lines that are in both files.
            new = (p for p in found if (p.policy, p.id) not in there)
            runs.append_lines(self.path / PREDICTIONS, map(dataclasses.asdict, new))
            part.unlink()

    def _read(self) -> dict[tuple[str, str], Prediction]:
        found = read(self.path / PREDICTIONS, self._policies, self._groups)
        return {(p.policy, p.id): p for p in found}

    def append(self, predictions: Iterable[Prediction]) -> None:
        """Adds finished predictions with one write, synced to disk.

        Raises:
            ValueError: a prediction with an impossible value, such as a score of NaN.
        """
        new = list(predictions)
        for p in new:
            refuse(field_problems(p), f"item {p.id} under {p.policy}")
        runs.append_lines(self._own, map(dataclasses.asdict, new))
        self.done |= {(p.policy, p.id): p for p in new}


def check_same(config: Path, request: dict[str, Any]) -> None:
    """Raises ValueError where config.json is not the request: the folder is another run's."""
    runs.check_same(
        runs.read_settings(config),
        json.loads(json.dumps(request)),
        f"{config.parent} holds another run",
        "repeat its command to resume it, or give another --out",
    )


def write_measured(out: Path | None, request: dict[str, Any], report: dict[str, Any]) -> None:
    """Writes config.json and results.json of a measurement, which has no predictions."""
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / CONFIG, request)
        write_json(out / RESULTS, report)


def read(
    path: Path,
    policies: Iterable[str] | None = None,
    groups: Mapping[str, str] | None = None,
) -> list[Prediction]:
    """The predictions of a file. An unfinished last line, left by a kill, is cut off the file.

    Args:
        policies: names of the run's policies; None: predictions of any policy are taken.
        groups: the group of every item by id; None: predictions of any item are taken.

    Raises:
        ValueError: another damaged line, or one of another run; names the lines and the reasons.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    # Every whole line ends with a newline, so an unfinished one is what follows the last newline.
    end = content.rfind(b"\n") + 1
    if end < len(content):
        os.truncate(path, end)
    known = None if policies is None else set(policies)
    found: dict[tuple[str, str], tuple[int, Prediction]] = {}
    wrong: list[str] = []
    for number, line in enumerate(runs.whole_lines(path), 1):
        try:
            values = parse_object(line, f"line {number}")
        except ValueError as error:
            wrong.append(str(error))
            continue
        problems = list(object_problems(values, FIELDS, others=False))
        problems = problems or [*_foreign(values, known, groups)]
        if not problems:
            key = values["policy"], values["id"]
            # The first of two equal keys stays; the other one is reported.
            if key not in found:
                found[key] = number, Prediction(**values)
                continue
            problems = [f"policy {key[0]!r} and id {key[1]!r} again, as in line {found[key][0]}"]
        wrong += [f"line {number}: {problem}" for problem in problems]
    refuse(wrong, str(path), "; remove the line, and the run computes it again")
    return [prediction for _, prediction in found.values()]


def _foreign(
    values: dict[str, Any], policies: set[str] | None, groups: Mapping[str, str] | None
) -> Iterable[str]:
    """Problems of a prediction that does not belong to this run."""
    if policies is not None and values["policy"] not in policies:
        wanted = ", ".join(sorted(policies))
        yield f"policy is {shown(values['policy'])}, expected one of {wanted}"
    if groups is None:
        return
    if values["id"] not in groups:
        yield f"id is {shown(values['id'])}, expected an item of the task"
    elif values["group"] != groups[values["id"]]:
        wanted = groups[values["id"]]
        yield f"group is {shown(values['group'])}, expected {wanted!r}"
