"""The work, memory and shapes of a suite's run, found without the model's weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from eval import latency, lm_eval, perplexity, results
from eval.command import adapted, checked, task_options, with_dtype
from eval.prompts import Shape, encode, make_batches, shapes
from eval.report.page import size
from eval.task import check_form, load_task
from kvjax.hf import load_tokenizer, read_model
from kvjax.nn import param_shapes
from kvjax.policies.importance import HeadScores
from kvjax.policies.named import parse_policy, resolve

SCORES = re.compile(r"(?<=[:,])scores=[^,]*,?")


def preview(name: str, command: Any) -> Iterator[str]:
    """Lines about the work, the memory, and the shapes that programs are compiled for.

    Args:
        name: a task, perplexity, latency or lm-eval.
        command: its settings.

    Raises:
        ValueError: settings that the command would refuse, or a policy that does not exist.
    """
    command = with_dtype(command)
    _check(name, command)
    policies = parse_policies(command.policy)
    try:
        model = read_model(command.model)
    except (ValueError, OSError) as error:
        yield f"no preview: the model's configuration cannot be read ({_line(error)})"
        return
    yield from _parameters(model, command.dtype)
    policies = {name: _with_scores(policy, model.config) for name, policy in policies.items()}
    if name == "latency":
        yield from _latency(model, policies, command)
    elif name == "perplexity":
        # A dense chunk is read as a whole and leaves nothing to feed.
        read = command.length if command.prefix is None else command.prefix
        shape = (read, command.length - read, command.batch_size)
        yield from _caches(model, policies, command.dtype, shape)
        yield "shapes: 1"
    elif name == "lm-eval":
        whole = command.max_length or model.config.context_length
        yield f"longest context {whole} tokens; the harness's tasks say how many there are"
        yield from _caches(model, policies, command.dtype, (whole, 0, command.batch_size))
    else:
        yield from _task(name, model, policies, command)


def _check(name: str, command: Any) -> None:
    """Raises ValueError for settings that the command would refuse."""
    checks = {"latency": latency.check, "perplexity": perplexity.check, "lm-eval": lm_eval.check}
    if name in checks:
        checks[name](command)
    else:
        checked(name, command)


def parse_policies(names: Sequence[str]) -> dict[str, Any]:
    """Policies by name, without their score files: a preview needs none of them.

    Raises:
        ValueError: a policy that does not exist.
    """
    return {name: parse_policy(SCORES.sub("", name).rstrip(",:")) for name in names}


def _with_scores(policy: Any, config: Any) -> Any:
    """The policy with equal head scores where it needs some: the budgets' sum is the same."""
    return resolve(policy, config, HeadScores(np.ones((config.num_layers, config.query_heads, 1))))


def _parameters(model: Any, dtype: str) -> Iterator[str]:
    count = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(model.config)))
    held = count * jax.numpy.dtype(dtype).itemsize
    yield f"parameters: {count / 1e6:,.1f} M, {_size(held)} in {dtype}"


def _caches(
    model: Any, policies: dict[str, Any], dtype: str, shape: tuple[int, int, int]
) -> Iterator[str]:
    """Bytes of a batch under each policy.

    Args:
        shape: prompt tokens, new tokens, sequences.
    """
    length, new, batch = shape
    one = Shape(length, new, 1)
    full = batch * results.uncompressed_bytes(model, dtype, one)
    yield f"{batch} × {length} + {new} tokens: full cache {_size(full)}"
    for name, policy in policies.items():
        held = batch * results.policy_bytes(model, dtype, policy, one)
        yield f"  {name}: {_size(held)} ({held / full:.1%})"


def _latency(model: Any, policies: dict[str, Any], command: Any) -> Iterator[str]:
    for context in command.contexts:
        for batch in command.batches:
            shape = (context, command.new_tokens, batch)
            yield from _caches(model, policies, command.dtype, shape)
    count = len(command.contexts) * len(command.batches)
    yield f"shapes: {count}; {count * len(policies) * (1 + command.repeats)} measurements"


def _task(name: str, model: Any, policies: dict[str, Any], command: Any) -> Iterator[str]:
    """Items and shapes of a task; only the largest cache where the data cannot be read."""
    try:
        tokenizer = load_tokenizer(command.model)
        options = task_options(command, tokenizer, model.config)
        task = adapted(load_task(name, options), command)
    except (ValueError, OSError) as error:
        yield f"items unknown: {_line(error)}"
        # Without items the longest prompt that fits stands for all.
        yield "shapes: one for each prompt bucket"
        whole = min(command.max_length or 10**9, model.config.context_length)
        yield from _caches(model, policies, command.dtype, (whole, 0, command.batch_size))
        return
    check_form(task, checked(name, command)[0])
    prompts = encode(task, tokenizer, model.config, command.chat, command.max_length)
    found = shapes(make_batches(prompts, task.items, command.batch_size, command.seed))
    tokens = sum(len(prompt.ids) for prompt in prompts)
    cut = sum(prompt.truncated for prompt in prompts)
    yield f"{len(prompts)} items, {tokens:,} prompt tokens, {cut} cut; {len(policies)} policies"
    read = len({(shape.bucket, shape.batch) for shape in found})
    yield f"shapes: {read}; prompts are read once for {len(policies)} policies"
    largest = max(found, key=lambda shape: shape.bucket * shape.batch)
    # The largest batch decides how much memory the run needs.
    shape = (largest.bucket, largest.max_new_tokens, largest.batch)
    yield from _caches(model, policies, command.dtype, shape)


def _size(count: float) -> str:
    return str(size(count))


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else text[:159] + "…"
