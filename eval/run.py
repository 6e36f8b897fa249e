"""One task, one model, any number of policies, through the compressed cache."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from eval import decoding, results, sizes, teacher
from eval.batches import Shape, make_batches, shapes
from eval.encoding import Prompt, encode
from eval.environment import environment
from eval.loaded import Loaded, facts, resolve_all
from eval.predictions import RESULTS, RunFolder, write_json
from eval.progress import progress_bar
from eval.settings import Settings
from eval.task import Task, check_form
from kvjax import processes
from kvjax.encoding import end_ids
from kvjax.identity import array_digest
from kvjax.policies.policy import Policy


def evaluate(
    loaded: Loaded,
    task: Task,
    settings: Settings,
    out: Path,
    options: dict[str, Any] | None = None,
    argv: Sequence[str] = (),
    quiet: bool = False,
) -> dict[str, Any]:
    """Answers what is not answered yet, scores it, and writes results.json.

    A run that was interrupted goes on where it stopped, and its files are those of a run that was
    not, times excepted: batches are the same whatever is finished. Each of several processes
    answers a share of the batches on a device of its own; process 0 puts the answers together.

    Args:
        out: folder of the run.
        options: of the task, for config.json: what its items depend on.
        argv: the command, for results.json.

    Returns:
        What results.json holds, see `eval.results`.

    Raises:
        ValueError: a policy, prompt or setting that does not fit the model, or a folder of another
            run.
    """
    start = time.monotonic()
    check_ids(task)
    check_form(task, settings.chat)
    policies = resolve_all(settings.policies, loaded.model)
    prompts = encode(
        task, loaded.tokenizer, loaded.model.config, settings.chat, settings.max_length
    )
    batches = make_batches(prompts, task.items, settings.batch_size, settings.seed)
    wanted = request(loaded, task, settings, options or {}, policies, prompts)
    folder = RunFolder(out, wanted, {item.id: item.group for item in task.items})
    before = len(folder.done)
    with progress_bar(quiet or not processes.is_writer()) as progress:
        total = len(policies) * sum(len(prompt.ids) for prompt in prompts) / jax.process_count()
        bar = progress.add_task(task.name, total=total, items=f"{before} answers")

        def finished(tokens: int) -> None:
            progress.update(bar, advance=tokens, items=f"{len(folder.done)} answers")

        if settings.protocol == "generate":
            mine = processes.share(batches)
            decoding.answer(loaded, task, settings, policies, mine, folder, finished)
        else:
            teacher.answer(loaded, task, settings, policies, prompts, folder, finished)
    folder.finish()
    lacking = len(policies) * len(task.items) - len(folder.done)
    if lacking > 0:
        raise ValueError(
            f"{out} lacks {lacking} predictions, expected a folder that all hosts share"
        )
    if settings.protocol == "generate":
        read = {shape: len(members) for shape, members in shapes(batches).items()}
    else:
        read = teacher.shapes(task, prompts, settings.protocol)
    rows = [_row(loaded, task, name, policy, read, folder) for name, policy in policies.items()]
    if settings.protocol == "generate":
        lengths = [len(prompt.ids) for prompt in prompts]
        for row, policy in zip(rows, policies.values(), strict=True):
            config, dtype = loaded.model.config, loaded.dtype
            row["kept_share"] = sizes.kept_share(policy, config, lengths, dtype)
    report = {
        "task": task.name,
        "metric": task.metric if settings.protocol == "generate" else teacher.METRIC,
        "model": loaded.name,
        "protocol": settings.protocol,
        "prompt": form(prompts, task),
        "seed": settings.seed,
        "items": len(task.items),
        "policies": rows,
        "seconds": round(time.monotonic() - start, 1),
        "computed": len(folder.done) - before,
        **environment(argv),
    }
    if processes.is_writer():
        write_json(out / RESULTS, report)
    return report


def request(
    loaded: Loaded,
    task: Task,
    settings: Settings,
    options: dict[str, Any],
    policies: Mapping[str, Policy],
    prompts: Sequence[Prompt],
) -> dict[str, Any]:
    """config.json: all that the predictions and their scores depend on."""
    items = [
        [item.id, item.prompt, item.references, item.max_new_tokens, item.group, dict(item.meta)]
        for item in task.items
    ]
    forms = sorted({prompt.chat for prompt in prompts})
    return {
        "task": task.name,
        "model": loaded.name,
        **facts(loaded.model, loaded.params, policies),
        **dataclasses.asdict(settings),
        "options": options,
        "eos_ids": [list(end_ids(loaded.tokenizer, loaded.model.config, chat)) for chat in forms],
        "items": len(task.items),
        "items_sha256": _digest([items, task.stops, task.chat_stops]),
        "prompt_ids": array_digest(np.concatenate([(len(p.ids), *p.ids) for p in prompts])),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def form(prompts: Sequence[Prompt], task: Task) -> str:
    """ "raw" or "chat", with the groups that stay raw inside a run with a chat template."""
    raw = {task.items[prompt.index].group: None for prompt in prompts if not prompt.chat}
    if len(raw) and any(prompt.chat for prompt in prompts):
        return f"chat, but raw: {', '.join(raw)}"
    return "raw" if raw else "chat"


def check_ids(task: Task) -> None:
    """Raises ValueError for a task without items, or two with one id: results go by it."""
    if not task.items:
        raise ValueError(f"task {task.name} has no items")
    seen: set[str] = set()
    for item in task.items:
        if item.id in seen:
            raise ValueError(f"task {task.name} has two items with id {item.id!r}")
        seen.add(item.id)


def _row(
    loaded: Loaded,
    task: Task,
    name: str,
    policy: Policy,
    read: Mapping[Shape, int],
    folder: RunFolder,
) -> dict[str, Any]:
    """The policy's entry in results.json, with prompts of so many of each shape."""
    kept, base = {}, []
    for shape, count in read.items():
        tokens = sizes.kept_tokens(policy, loaded.model.config, shape.bucket, loaded.dtype)
        if tokens is not None:
            kept[str(shape.bucket)] = tokens
        gqa = sizes.gqa_bytes(loaded.model, loaded.dtype, shape)
        base += [] if gqa is None else [gqa] * count
    predictions = [folder.done[name, item.id] for item in task.items]
    return results.of_policy(task, predictions, kept, base)
