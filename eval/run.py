"""One task, one model, any number of policies, through the compressed cache.

Protocol "generate" decodes the answers: the first token comes from the prefill, the others from the
compressed cache. Protocols "teacher" and "after" feed the right answers, see `eval.likelihood`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from eval import likelihood, results
from eval.predictions import RESULTS, Prediction, RunFolder, write_json
from eval.prompts import Prompt, PromptBatch, Shape, encode, make_batches, shapes
from eval.results import environment, facts
from eval.stops import ends_at_stops
from eval.task import Item, Settings, Task, check_form
from kvjax import processes
from kvjax.chat import end_ids
from kvjax.generation import Generation, generate_each
from kvjax.identity import array_digest
from kvjax.nn import Transformer
from kvjax.policies.named import resolve_each
from kvjax.policies.policy import Policy
from kvjax.progress import progress_bar
from kvjax.scoring import FULL
from kvjax.text import added_text, until_stop


@dataclass(frozen=True)
class LoadedModel:
    """A model with its parameters and tokenizer.

    Attributes:
        name: checkpoint directory, hub id or builtin name that was asked for.
    """

    name: str
    model: Transformer
    params: Any
    tokenizer: Any

    @property
    def dtype(self) -> Any:
        """Dtype of the parameters and of the cache."""
        return self.params["embedding"].dtype


def resolve_all(names: Sequence[str], model: Transformer) -> dict[str, Policy]:
    """Policies by name, with the model's head scores where they need some."""
    return dict(zip(names, resolve_each(names, model.config), strict=True))


def evaluate(
    loaded: LoadedModel,
    task: Task,
    settings: Settings,
    out: Path,
    options: dict[str, Any] | None = None,
    argv: Sequence[str] = (),
    quiet: bool = False,
) -> dict[str, Any]:
    """Answers the items that have no prediction yet, scores them, and writes results.json.

    A run that was interrupted continues where it stopped. Except for times, its files equal those
    of an uninterrupted run, because batches do not depend on what is finished. Each of several
    processes answers a share of the batches on its own device; process 0 collects the answers.

    Args:
        out: folder of the run.
        options: of the task, for config.json: what its items depend on.
        argv: the command, for results.json.

    Returns:
        The content of results.json, see `eval.results`.

    Raises:
        ValueError: a policy, prompt or setting that does not fit the model, or a folder of another
            run.
    """
    start = time.monotonic()
    # Prompts and config.json: a folder of another run is refused before the model answers.
    check_ids(task)
    check_form(task, settings)
    policies = resolve_all(settings.policies, loaded.model)
    config = loaded.model.config
    prompts = encode(task, loaded.tokenizer, config, settings.chat, settings.max_length)
    wanted = request(loaded, task, settings, options or {}, policies, prompts)
    folder = RunFolder(out, wanted, {item.id: item.group for item in task.items})
    # Answers, appended to the folder batch by batch.
    before = len(folder.done)
    with progress_bar(quiet) as progress:
        total = len(policies) * sum(len(prompt.ids) for prompt in prompts) / jax.process_count()
        bar = progress.add_task(task.name, total=total, items=f"{before} answers")

        def finished(tokens: int) -> None:
            progress.update(bar, advance=tokens, items=f"{len(folder.done)} answers")

        answer = _decode if settings.protocol == "generate" else _teacher_force
        read = answer(loaded, task, settings, policies, prompts, folder, finished)
    # All predictions are in one file now; the report is made from them alone.
    folder.finish()
    # Each process sees all predictions only if the folder is on a shared disk.
    lacking = len(policies) * len(task.items) - len(folder.done)
    if lacking > 0:
        raise ValueError(
            f"{out} lacks {lacking} predictions, expected a folder that all hosts share"
        )
    rows = [_row(loaded, task, name, policy, read, folder) for name, policy in policies.items()]
    if settings.protocol == "generate":
        lengths = [len(prompt.ids) for prompt in prompts]
        for row, policy in zip(rows, policies.values(), strict=True):
            row["kept_share"] = results.kept_share(policy, config, lengths, loaded.dtype)
    report = {
        "task": task.name,
        "metric": task.metric if settings.protocol == "generate" else likelihood.METRIC,
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


def check_ids(task: Task) -> None:
    """Raises ValueError for a task without items, or with two items of one id."""
    if not task.items:
        raise ValueError(f"task {task.name} has no items")
    seen: set[str] = set()
    for item in task.items:
        if item.id in seen:
            raise ValueError(f"task {task.name} has two items with id {item.id!r}")
        seen.add(item.id)


def request(
    loaded: LoadedModel,
    task: Task,
    settings: Settings,
    options: dict[str, Any],
    policies: Mapping[str, Policy],
    prompts: Sequence[Prompt],
) -> dict[str, Any]:
    """The content of config.json: everything that predictions and their scores depend on."""
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
        # The length before each prompt keeps two splits of the same ids apart.
        "prompt_ids": array_digest(np.concatenate([(len(p.ids), *p.ids) for p in prompts])),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def form(prompts: Sequence[Prompt], task: Task) -> str:
    """ "raw" or "chat", with the groups that stay raw inside a run with a chat template."""
    # A dict instead of a set keeps the order of the groups.
    raw = {task.items[prompt.index].group: None for prompt in prompts if not prompt.chat}
    if len(raw) and any(prompt.chat for prompt in prompts):
        return f"chat, but raw: {', '.join(raw)}"
    return "raw" if raw else "chat"


def _decode(
    loaded: LoadedModel,
    task: Task,
    settings: Settings,
    policies: Mapping[str, Policy],
    prompts: Sequence[Prompt],
    folder: RunFolder,
    finished: Callable[[int], None],
) -> dict[Shape, int]:
    """Appends the missing predictions of this process's batches.

    A batch with a missing prediction is decoded as a whole: its rows share random numbers and a
    compiled shape, so an interrupted run gets the answers that an uninterrupted run gets.

    Args:
        finished: called with the number of prompt tokens of each batch, once for each policy.

    Returns:
        The number of prompts of each shape.
    """
    batches = make_batches(prompts, task.items, settings.batch_size, settings.seed)
    mine = processes.share(batches)
    forms = {batch.chat for batch in mine}
    eos = {form: end_ids(loaded.tokenizer, loaded.model.config, form) for form in forms}
    for batch in mine:
        missing = {name: _missing(task, batch, name, folder) for name in policies}
        lacking = {name: policy for name, policy in policies.items() if missing[name]}
        tokens = sum(len(prompt.ids) for prompt in batch.prompts)
        finished(tokens * (len(policies) - len(lacking)))
        if lacking:
            stops = task.chat_stops if batch.chat else task.stops
            judge = functools.partial(_judge_batch, loaded, task, batch, stops, missing, folder)
            done = functools.partial(finished, tokens)
            _answer_batch(loaded, settings, lacking, batch, stops, eos[batch.chat], judge, done)
    return {shape: len(members) for shape, members in shapes(batches).items()}


def _missing(task: Task, batch: PromptBatch, policy: str, folder: RunFolder) -> list[Prompt]:
    """The prompts of a batch that have no prediction under the policy."""
    return [p for p in batch.prompts if (policy, task.items[p.index].id) not in folder.done]


def _answer_batch(
    loaded: LoadedModel,
    settings: Settings,
    policies: Mapping[str, Policy],
    batch: PromptBatch,
    stops: Sequence[str],
    eos: tuple[int, ...],
    judge: Callable[[str, Generation], None],
    finished: Callable[[], None],
) -> None:
    """Reads a batch once and answers it under each of the policies."""
    names = list(policies)

    def on_result(number: int, out: Generation) -> None:
        judge(names[number], out)
        finished()

    generate_each(
        loaded.model,
        loaded.params,
        batch.rows,
        list(policies.values()),
        max_new_tokens=batch.shape.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        eos_ids=eos,
        seed=batch.seed,
        on_tokens=ends_at_stops(loaded.tokenizer, [p.ids for p in batch.prompts], stops),
        on_result=on_result,
    )


def _judge_batch(
    loaded: LoadedModel,
    task: Task,
    batch: PromptBatch,
    stops: Sequence[str],
    missing: Mapping[str, Sequence[Prompt]],
    folder: RunFolder,
    policy: str,
    out: Generation,
) -> None:
    """Scores a batch's answers under one policy and appends the predictions that were missing."""
    # `Generation` counts the whole batch, its filling rows included.
    held = out.cache_bytes // batch.shape.batch
    full = out.full_cache_bytes // batch.shape.batch
    # Filling rows at the batch's end belong to no prompt.
    rows = dict(zip(batch.prompts, out.tokens, strict=False))
    for prompt in missing[policy]:
        item = task.items[prompt.index]
        text = added_text(loaded.tokenizer, prompt.ids, rows[prompt])
        answer = until_stop(text, stops)
        score = score_of(task, item, answer)
        folder.append([_prediction(task, prompt, policy, answer, score, held, full)])


UNREADABLE = (ValueError, TypeError, ArithmeticError, LookupError, RecursionError, MemoryError)


def score_of(task: Task, item: Item, answer: str) -> float:
    """The task's score of an answer; 0, with a warning, where the score cannot be computed.

    Scores take any text. If one does not, its item is wrong, and hours of answers are not lost.
    """
    try:
        return float(task.score(item, answer))
    except UNREADABLE as error:
        why = f"{type(error).__name__}: {error}"
        warnings.warn(
            f"{task.name}, item {item.id}: no score ({why:.200}), counted as 0", stacklevel=2
        )
        return 0.0


def _teacher_force(
    loaded: LoadedModel,
    task: Task,
    settings: Settings,
    policies: Mapping[str, Policy],
    prompts: Sequence[Prompt],
    folder: RunFolder,
    finished: Callable[[int], None],
) -> dict[Shape, int]:
    """As `_decode`, for the protocols that feed the right answer.

    A score is 1 where every token of the answer is right, else 0. Cache bytes are those of the
    prompt's entries, without room for the answer.
    """
    chosen = task, prompts, policies, settings.protocol
    forced = likelihood.TeacherForced.of(loaded.tokenizer, *chosen)
    for part in processes.share(forced.batches(settings.batch_size)):
        ids = [task.items[prompts[index].index].id for index in part]
        if any((name, item_id) not in folder.done for name in policies for item_id in ids):
            found = forced.judge(loaded.model, loaded.params, part, settings.batch_size)
            full = found.cache_bytes[FULL]
            new = [
                _prediction(
                    *(task, prompts[index], name, None, float(right)),
                    *(found.cache_bytes.get(name, full), full),
                )
                for name in policies
                for index, right in zip(part, found.right.get(name, found.right[FULL]), strict=True)
            ]
            # An interrupted batch is judged as a whole again; finished rows are not repeated.
            folder.append(p for p in new if (p.policy, p.id) not in folder.done)
        finished(len(policies) * sum(len(prompts[index].ids) for index in part))
    return forced.shapes()


def _prediction(
    task: Task,
    prompt: Prompt,
    policy: str,
    text: str | None,
    score: float,
    held: int,
    full: int,
) -> Prediction:
    """A line of predictions.jsonl. `held` and `full` are bytes of one sequence's caches."""
    item = task.items[prompt.index]
    return Prediction(
        id=item.id,
        group=item.group,
        policy=policy,
        prompt_tokens=len(prompt.ids),
        truncated=prompt.truncated,
        text=text,
        score=score,
        cache_bytes=held,
        full_cache_bytes=full,
    )


def _row(
    loaded: LoadedModel,
    task: Task,
    name: str,
    policy: Policy,
    read: Mapping[Shape, int],
    folder: RunFolder,
) -> dict[str, Any]:
    """The policy's entry in results.json. `read`: the number of prompts of each shape."""
    kept, base = {}, []
    for shape, count in read.items():
        tokens = results.kept_tokens(policy, loaded.model.config, shape.bucket, loaded.dtype)
        if tokens is not None:
            kept[str(shape.bucket)] = tokens
        gqa = results.gqa_bytes(loaded.model, loaded.dtype, shape)
        base += [] if gqa is None else [gqa] * count
    predictions = [folder.done[name, item.id] for item in task.items]
    return results.of_policy(task, predictions, kept, base)
