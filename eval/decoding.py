"""Answers by decoding: the first token from the prefill, the others from the compressed cache."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

from eval.batches import Batch
from eval.encoding import Prompt
from eval.loaded import Loaded
from eval.predictions import Prediction, RunFolder
from eval.settings import Settings
from eval.task import Task
from kvjax.encoding import end_ids
from kvjax.generation import Generation, generate_each
from kvjax.policies.policy import Policy
from kvjax.text import added_text


def answer(
    loaded: Loaded,
    task: Task,
    settings: Settings,
    policies: Mapping[str, Policy],
    batches: Sequence[Batch],
    folder: RunFolder,
    finished: Callable[[int], None],
) -> None:
    """Appends the predictions that are missing.

    Args:
        finished: called with the tokens of the prompts of each batch and policy.
    """
    forms = {batch.chat for batch in batches}
    eos = {form: end_ids(loaded.tokenizer, loaded.model.config, form) for form in forms}
    for batch in batches:
        missing = {name: _missing(task, batch, name, folder) for name in policies}
        lacking = {name: policy for name, policy in policies.items() if missing[name]}
        tokens = sum(len(prompt.ids) for prompt in batch.prompts)
        finished(tokens * (len(policies) - len(lacking)))
        if lacking:
            judge = functools.partial(_judge_batch, loaded, task, batch, missing, folder)
            done = functools.partial(finished, tokens)
            _answer_batch(loaded, settings, lacking, batch, eos[batch.chat], judge, done)


def _answer_batch(
    loaded: Loaded,
    settings: Settings,
    policies: Mapping[str, Policy],
    batch: Batch,
    eos: tuple[int, ...],
    judge: Callable[[str, Generation], None],
    finished: Callable[[], None],
) -> None:
    """Reads a batch once and answers it under each of the policies.

    What a batch lacks is answered with the whole of it: its rows share random numbers and a
    compiled shape, and a run that was interrupted gets what the other would have got.
    """
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
        on_result=on_result,
    )


def _judge_batch(
    loaded: Loaded,
    task: Task,
    batch: Batch,
    missing: Mapping[str, Sequence[Prompt]],
    folder: RunFolder,
    policy: str,
    out: Generation,
) -> None:
    """Appends the predictions that a policy lacks of a batch."""
    held = out.cache_bytes // batch.shape.batch
    full = out.full_cache_bytes // batch.shape.batch
    rows = dict(zip(batch.prompts, out.tokens, strict=False))
    for prompt in missing[policy]:
        text = added_text(loaded.tokenizer, prompt.ids, rows[prompt])
        folder.append([_judged(task, prompt, policy, text, held, full)])


def _missing(task: Task, batch: Batch, policy: str, folder: RunFolder) -> list[Prompt]:
    """The prompts of a batch that the policy has not answered."""
    return [p for p in batch.prompts if (policy, task.items[p.index].id) not in folder.done]


def _judged(task: Task, prompt: Prompt, policy: str, text: str, held: int, full: int) -> Prediction:
    item = task.items[prompt.index]
    answer = until_stop(text, task.chat_stops if prompt.chat else task.stops)
    return Prediction(
        id=item.id,
        group=item.group,
        policy=policy,
        prompt_tokens=len(prompt.ids),
        truncated=prompt.truncated,
        text=answer,
        score=float(task.score(item, answer)),
        cache_bytes=held,
        full_cache_bytes=full,
    )


def until_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stops."""
    ends = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))]
