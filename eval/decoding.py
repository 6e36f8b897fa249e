"""Answers by decoding: the first token from the prefill, the others from the compressed cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from eval.batches import Batch
from eval.encoding import Prompt
from eval.loaded import Loaded
from eval.predictions import Prediction, RunFolder
from eval.settings import Settings
from eval.task import Task
from kvjax.encoding import end_ids
from kvjax.generation import generate
from kvjax.headkv.policy import Policy
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

    What a batch lacks is answered with the whole of it: its rows share random numbers and a
    compiled shape, and a run that was interrupted gets what the other would have got.

    Args:
        finished: called with the tokens of the prompts of each batch and policy.
    """
    forms = {batch.chat for batch in batches}
    eos = {form: end_ids(loaded.tokenizer, loaded.model.config, form) for form in forms}
    for name, policy in policies.items():
        for batch in batches:
            missing = [
                p for p in batch.prompts if (name, task.items[p.index].id) not in folder.done
            ]
            if missing:
                out = generate(
                    loaded.model,
                    loaded.params,
                    batch.rows,
                    max_new_tokens=batch.shape.max_new_tokens,
                    policy=policy,
                    temperature=settings.temperature,
                    top_p=settings.top_p,
                    top_k=settings.top_k,
                    eos_ids=eos[batch.chat],
                    seed=batch.seed,
                )
                held = out.cache_bytes // batch.shape.batch
                full = out.full_cache_bytes // batch.shape.batch
                rows = dict(zip(batch.prompts, out.tokens, strict=False))
                for prompt in missing:
                    text = added_text(loaded.tokenizer, prompt.ids, rows[prompt])
                    folder.append([_judged(task, prompt, name, text, held, full)])
            finished(sum(len(prompt.ids) for prompt in batch.prompts))


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
