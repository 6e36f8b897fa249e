"""What a run would read, compile and hold, without the model's weights."""

from __future__ import annotations

from typing import Any

from eval import sizes
from eval.batches import make_batches, shapes
from eval.encoding import encode
from eval.loaded import resolve_all
from eval.run import check_ids
from eval.settings import Settings
from eval.task import Task, check_form
from kvjax.nn import Transformer


def dry_run(
    model: Transformer, tokenizer: Any, task: Task, settings: Settings, dtype: Any
) -> dict[str, Any]:
    """Items, prompt tokens and cache bytes of each bucket, and shapes to compile for.

    Args:
        dtype: that the parameters would have.

    Returns:
        task, items, shapes, buckets: [{bucket, max_new_tokens, batch, items, prompt_tokens,
        truncated, full_cache_bytes, gqa_cache_bytes, cache_bytes: {policy: bytes}}], bytes of one
        sequence with room for its answer.

    Raises:
        ValueError: as `eval.run.evaluate`.
    """
    check_ids(task)
    check_form(task, settings.chat)
    policies = resolve_all(settings.policies, model)
    prompts = encode(task, tokenizer, model.config, settings.chat, settings.max_length)
    batches = make_batches(prompts, task.items, settings.batch_size, settings.seed)
    buckets = []
    for shape, members in shapes(batches).items():
        lengths = [len(prompt.ids) for prompt in members]
        buckets.append(
            {
                "bucket": shape.bucket,
                "max_new_tokens": shape.max_new_tokens,
                "batch": shape.batch,
                "items": len(members),
                "prompt_tokens": {"least": min(lengths), "most": max(lengths)},
                "truncated": sum(prompt.truncated for prompt in members),
                "full_cache_bytes": sizes.uncompressed_bytes(model, dtype, shape),
                "gqa_cache_bytes": sizes.gqa_bytes(model, dtype, shape),
                "cache_bytes": {
                    name: sizes.policy_bytes(model, dtype, policy, shape)
                    for name, policy in policies.items()
                },
            }
        )
    return {
        "task": task.name,
        "items": len(task.items),
        "shapes": len({(row["bucket"], row["batch"]) for row in buckets}),
        "buckets": buckets,
    }
