"""Right answers, teacher-forced through the compressed caches of all policies after one prefill.

Protocol "teacher": the prefill predicts the first token, before anything is dropped, and so the
same one for every policy. Protocol "after": the question follows the compression, and the whole
answer comes from the compressed cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from eval.batches import Shape
from eval.encoding import Prompt
from eval.loaded import Loaded, bounds_growth
from eval.predictions import Prediction, RunFolder
from eval.settings import Settings
from eval.task import Item, Task
from kvjax import processes
from kvjax.encoding import ids_after
from kvjax.example import Example
from kvjax.policies.policy import Compress, Full, Policy
from kvjax.scoring import AFTER, FULL, INSIDE, compare, round_up

METRIC = "teacher_forced_exact_match"


def answer(
    loaded: Loaded,
    task: Task,
    settings: Settings,
    policies: Mapping[str, Policy],
    prompts: Sequence[Prompt],
    folder: RunFolder,
    finished: Callable[[int], None],
) -> None:
    """Appends what is missing of this process's share; score 1 where every token is right, else 0.

    Bytes are those of the prompt's entries, without room for the answer.

    Args:
        finished: called with the tokens of the prompts that were read, policies times.

    Raises:
        ValueError: an item without exactly one right answer, a model without an EOS, policies that
            `kvjax.scoring.compare` cannot compare.
    """
    compressing = comparable(policies)
    if not loaded.model.config.eos_ids:
        raise ValueError("the model has no EOS id: no telling where an answer ends")
    examples = [_example(loaded, task, prompt) for prompt in prompts]
    protocol = AFTER if settings.protocol == "after" else INSIDE
    groups: dict[tuple[int, int], list[int]] = {}
    for index, example in enumerate(examples):
        asked = example.question_length if protocol == AFTER else 0
        key = round_up(len(example.prompt) - asked), round_up(len(example.answer) + asked)
        groups.setdefault(key, []).append(index)
    parts = [
        members[start : start + settings.batch_size]
        for _, members in sorted(groups.items(), reverse=True)
        for start in range(0, len(members), settings.batch_size)
    ]
    for part in processes.share(parts):
        ids = [task.items[prompts[index].index].id for index in part]
        if any((name, item_id) not in folder.done for name in policies for item_id in ids):
            chosen = [examples[index] for index in part]
            model, params = loaded.model, loaded.params
            found = compare(model, params, chosen, compressing, protocol, settings.batch_size)
            new = [
                _judged(task, prompts[index], name, bool(right), found.cache_bytes)
                for name in policies
                for index, right in zip(part, found.right[_key(policies, name)], strict=True)
            ]
            folder.append(p for p in new if (p.policy, p.id) not in folder.done)
        finished(len(policies) * sum(len(prompts[index].ids) for index in part))


def shapes(task: Task, prompts: Sequence[Prompt], protocol: str) -> dict[Shape, int]:
    """How many prompts are compressed in each shape, without room for an answer."""
    found: Counter[Shape] = Counter()
    for prompt in prompts:
        meta = task.items[prompt.index].meta
        asked = meta.get("question_tokens", 0) if protocol == "after" else 0
        found[Shape(round_up(len(prompt.ids) - asked), 0, 1)] += 1
    return dict(found)


def comparable(policies: Mapping[str, Policy]) -> dict[str, Compress]:
    """The policies that compress.

    Raises:
        ValueError: one that keeps everything in 8 bits, or bounds the growth: answers that are fed
            in one piece do not show what it does.
    """
    compressing = {}
    for name, policy in policies.items():
        if isinstance(policy, Compress) and not bounds_growth(policy):
            compressing[name] = policy
        elif policy != Full():
            raise ValueError(f"policy {name!r} cannot be teacher-forced: use protocol 'generate'")
    return compressing


def _key(policies: Mapping[str, Policy], name: str) -> str:
    return name if isinstance(policies[name], Compress) else FULL


def _example(loaded: Loaded, task: Task, prompt: Prompt) -> Example:
    """The question as `compare` wants it. An item's meta may hold the answer's ids ("answer") and
    the number of tokens at the prompt's end that ask ("question_tokens")."""
    item = task.items[prompt.index]
    ids = item.meta.get("answer") or _encoded(loaded, item)
    return Example(
        prompt=prompt.ids,
        answer=tuple(ids),
        question_length=item.meta.get("question_tokens", 0),
    )


def _encoded(loaded: Loaded, item: Item) -> list[int]:
    if len(item.references) != 1:
        raise ValueError(
            f"item {item.id} has {len(item.references)} right answers, expected one: "
            "use protocol 'generate'"
        )
    return ids_after(loaded.tokenizer, f" {item.references[0]}")


def _judged(
    task: Task, prompt: Prompt, policy: str, right: bool, cache_bytes: Mapping[str, int]
) -> Prediction:
    item = task.items[prompt.index]
    held = cache_bytes.get(policy, cache_bytes[FULL])
    return Prediction(
        id=item.id,
        group=item.group,
        policy=policy,
        prompt_tokens=len(prompt.ids),
        truncated=prompt.truncated,
        text=None,
        score=float(right),
        cache_bytes=held,
        full_cache_bytes=cache_bytes[FULL],
    )
