"""`python -m eval lm-eval`: tasks of lm-evaluation-harness (0.4.13) from the compressed cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from eval.command import (
    Dtype,
    Json,
    MeshText,
    Model,
    Policies,
    alone,
    check_arguments,
    print_report,
    with_dtype,
    write_report,
)
from eval.harness_scores import scores
from eval.predictions import write_measured
from eval.report.runs import measured
from kvjax.checks import COUNT, SIZE, Range, check_ranges, optional
from kvjax.extras import import_extra
from kvjax.usage import parsed

RANGES = {
    "num_fewshot": optional(SIZE),
    "limit": optional(COUNT),
    "batch_size": COUNT,
    "max_length": Range(least=2, most=COUNT.most, whole=True, optional=True),
}


@dataclass(frozen=True)
class HarnessCommand:
    """Runs tasks of lm-evaluation-harness.

    A continuation's log-likelihood is that of its tokens, fed after the compressed context. The
    context's last token is fed after the compression too, so the compressed cache predicts every
    token of the continuation.

    Attributes:
        tasks: names of tasks, groups or tags; each counts once in the mean.
        include_path: folder with task files (.yaml) of your own; if all tasks are from there,
            nothing else is looked for.
        num_fewshot: examples in the prompt; the task's own number by default.
        limit: number of documents of each task, from its start.
        dense: score log-likelihoods without a cache, in one forward pass; policy "full" only.
        chat: prompts inside the tokenizer's chat template.
        max_length: tokens of context and continuation, where less than the model's context.
        out: folder for config.json and results.json.
    """

    model: Model
    tasks: tuple[str, ...]
    policy: Policies = ()
    out: Path | None = None
    include_path: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    dense: bool = False
    chat: bool = False
    batch_size: int = 8
    max_length: int | None = None
    mesh: MeshText = None
    dtype: Dtype = None
    json_file: Json = None


def main(argv: Sequence[str]) -> None:
    """Parses the arguments and runs the command."""
    command = parsed(HarnessCommand, "python -m eval lm-eval", argv)
    run(command, ["lm-eval", *argv])


def run(command: HarnessCommand, argv: Sequence[str]) -> None:
    """Measures, prints a table, and writes the result where it was asked for."""
    with alone(command.out):
        report = measure(command, argv)
    print_report(report)
    write_report(command.json_file, report)


def measure(command: HarnessCommand, argv: Sequence[str] = ()) -> dict[str, Any]:
    """The content of results.json, as for a task. Its groups are the requested tasks and groups.

    Raises:
        ValueError: lm-eval is not installed, unknown tasks, policies that do not fit, or a folder
            of another run.
    """
    # This import is first, so that a missing package shows before a model is read.
    simple_evaluate = import_extra("lm_eval.evaluator", "lm-eval").simple_evaluate

    import kvjax
    from eval.harness_model import CompressedLM
    from eval.results import environment, facts
    from eval.run import LoadedModel, resolve_all
    from kvjax.mesh import named_mesh

    start, command = time.monotonic(), with_dtype(command)
    names = command.policy or ("full",)
    check_arguments(command)
    check(command)
    # Tasks and the folder are checked before weights are loaded.
    request = _request(command, names)
    manager = task_manager(command.tasks, command.include_path)
    requested = _requested(manager, command.tasks)
    tokenizer = kvjax.load_tokenizer(command.model)
    model, params = kvjax.load(command.model, command.dtype, named_mesh(command.mesh))
    loaded = LoadedModel(command.model, model, params, tokenizer)
    policies = resolve_all(names, loaded.model)
    request |= facts(model, params, policies)
    if (earlier := measured(command.out, request)) is not None:
        return earlier
    # One evaluation by the harness for each policy.
    entries = []
    for name, policy in policies.items():
        model = CompressedLM(
            *(loaded, policy, command.dense, command.batch_size),
            max_length=command.max_length,
            chat=command.chat,
        )
        found: Any = simple_evaluate(
            model=model,
            tasks=list(requested),
            task_manager=manager,
            num_fewshot=command.num_fewshot,
            limit=command.limit,
            # Bootstrapped errors of metrics that have no formula for one.
            bootstrap_iters=1000,
            log_samples=False,
            apply_chat_template=command.chat,
        )
        entries.append(
            {"policy": name, **scores(found, requested), **model.bytes(), "truncated": 0}
        )
    report = {
        "task": "lm-eval",
        "metric": "mean of the tasks",
        **request,
        "items": entries[0]["all"]["items"],
        "policies": entries,
        "lm_eval": version("lm_eval"),
        "seconds": round(time.monotonic() - start, 1),
        **environment(argv),
    }
    write_measured(command.out, request, report)
    return report


def check(command: HarnessCommand) -> None:
    """Raises ValueError for settings that are out of range or do not fit each other."""
    check_ranges(vars(command), RANGES)
    if command.dense and (command.policy or ("full",)) != ("full",):
        raise ValueError("--dense scores without a cache: no --policy but full")


def task_manager(tasks: Sequence[str], include_path: Path | None) -> Any:
    """The harness's index of tasks. A folder that has all of `tasks` is indexed alone.

    Raises:
        ValueError: no such folder, or a task that is not known.
    """
    TaskManager = import_extra("lm_eval.tasks", "lm-eval").TaskManager
    if not tasks:
        raise ValueError("got no tasks, expected --tasks NAME …")
    place = None if include_path is None else str(include_path)
    if include_path is not None:
        if not include_path.is_dir():
            raise ValueError(f"no folder at {include_path}")
        # The harness's own index has thousands of files and takes seconds to read.
        own = TaskManager(include_path=place, include_defaults=False)
        if set(tasks) <= set(own.all_tasks):
            return own
    manager = TaskManager(include_path=place)
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise ValueError(f"lm-evaluation-harness has no task {', '.join(unknown)}")
    return manager


def _requested(manager: Any, tasks: Sequence[str]) -> dict[str, list[str]]:
    """The requested names, each with its tasks where the name is a tag, else with none."""
    tags = set(manager.all_tags)
    return {n: sorted(manager.task_index[n].tags) if n in tags else [] for n in tasks}


def _request(command: HarnessCommand, names: Sequence[str]) -> dict[str, Any]:
    return {
        "model": command.model,
        "dtype": command.dtype,
        "tasks": list(command.tasks),
        "num_fewshot": command.num_fewshot,
        "limit": command.limit,
        "protocol": "dense" if command.dense else "compressed",
        "prompt": "chat" if command.chat else "raw",
        "max_length": command.max_length,
        "batch_size": command.batch_size,
        "policy_names": list(names),
    }
