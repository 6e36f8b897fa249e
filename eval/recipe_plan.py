"""What a run would read, hold and compile, printed line by line before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from eval.recipes import RecipeRun

SCORES = re.compile(r"(?<=[:,])scores=[^,]*,?")


def plan(run: RecipeRun, words: Sequence[str]) -> Iterator[str]:
    """Lines about the work, the memory and the shapes that programs are compiled for.

    Args:
        words: arguments of `python -m eval`.

    Raises:
        ValueError: a command that would be refused, or a policy that does not exist.
    """
    from kvjax.hf import read_model

    command = parse(run, words)
    _check(run.command, command)
    policies = parse_policies(run.policies)
    try:
        model = read_model(run.model)
    except (ValueError, OSError) as error:
        yield f"no plan: the model's configuration cannot be read ({_line(error)})"
        return
    yield from _parameters(model, command.dtype)
    policies = {name: _with_scores(policy, model.config) for name, policy in policies.items()}
    if run.command == "latency":
        yield from _latency(model, policies, command)
    elif run.command == "perplexity":
        shape = (command.length if command.prefix is None else command.prefix, 0)
        rest = 0 if command.prefix is None else command.length - command.prefix
        yield from _caches(model, policies, command.dtype, (shape[0], rest, command.batch_size))
        yield "shapes: 1"
    elif run.command == "lm-eval":
        whole = command.max_length or model.config.context_length
        yield f"longest context {whole} tokens; how many there are, the harness's tasks say"
        yield from _caches(model, policies, command.dtype, (whole, 0, command.batch_size))
    else:
        yield from _task(run, model, policies, command)


def parse(run: RecipeRun, words: Sequence[str]) -> Any:
    """The command as the command line reads it.

    Raises:
        ValueError: an option that the command does not have.
    """
    import contextlib
    import io

    import tyro

    from eval.command import TaskCommand
    from eval.latency import LatencyCommand
    from eval.lm_eval import HarnessCommand
    from eval.perplexity import PerplexityCommand

    kinds = {
        "latency": LatencyCommand,
        "perplexity": PerplexityCommand,
        "lm-eval": HarnessCommand,
    }
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return tyro.cli(kinds.get(run.command, TaskCommand), args=list(words[1:]))
    except SystemExit:
        text = " ".join(re.sub(r"[─│╭╮╰╯]", " ", said.getvalue()).split())
        raise ValueError(f"{run.name}: {text[:300]}") from None


def _check(name: str, command: Any) -> None:
    """Raises ValueError for options that the command would refuse."""
    from eval import command as task
    from eval import latency, lm_eval, perplexity

    checks = {"latency": latency.check, "perplexity": perplexity.check, "lm-eval": lm_eval.check}
    if name in checks:
        checks[name](command)
    else:
        task.checked(name, command)


def parse_policies(names: Sequence[str]) -> dict[str, Any]:
    """Policies by name, without their score files: a plan needs none of them.

    Raises:
        ValueError: a policy that does not exist.
    """
    from kvjax.policies import parse_policy

    return {name: parse_policy(SCORES.sub("", name).rstrip(",:")) for name in names}


def _with_scores(policy: Any, config: Any) -> Any:
    """The policy with equal scores where it wants some: the sum of the budgets is the same."""
    from kvjax.policies.importance import HeadScores
    from kvjax.policies.named import resolve

    return resolve(policy, config, HeadScores(np.ones((config.num_layers, config.query_heads, 1))))


def _parameters(model: Any, dtype: str) -> Iterator[str]:
    import jax

    from kvjax.sharding import param_shapes

    count = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(model)))
    size = count * jax.numpy.dtype(dtype).itemsize
    yield f"parameters: {count / 1e6:,.1f} M, {_size(size)} in {dtype}"


def _caches(
    model: Any, policies: dict[str, Any], dtype: str, shape: tuple[int, int, int]
) -> Iterator[str]:
    """Bytes of a batch under each policy.

    Args:
        shape: prompt tokens, new tokens, sequences.
    """
    from eval import sizes
    from eval.batches import Shape

    length, new, batch = shape
    one = Shape(length, new, 1)
    full = batch * sizes.uncompressed_bytes(model, dtype, one)
    yield f"{batch} × {length} + {new} tokens: full cache {_size(full)}"
    for name, policy in policies.items():
        held = batch * sizes.policy_bytes(model, dtype, policy, one)
        yield f"  {name}: {_size(held)} ({held / full:.1%})"


def _latency(model: Any, policies: dict[str, Any], command: Any) -> Iterator[str]:
    for context in command.contexts:
        for batch in command.batches:
            shape = (context, command.new_tokens, batch)
            yield from _caches(model, policies, command.dtype, shape)
    shapes = len(command.contexts) * len(command.batches)
    yield f"shapes: {shapes}; {shapes * len(policies) * (1 + command.repeats)} measurements"


def _task(run: RecipeRun, model: Any, policies: dict[str, Any], command: Any) -> Iterator[str]:
    """Items and shapes; where the data cannot be read, the largest cache alone."""
    from eval.batches import make_batches, shapes
    from eval.command import adapted, task_options
    from eval.encoding import encode
    from eval.registry import load_task
    from eval.task import check_form
    from kvjax.hf import load_tokenizer

    try:
        tokenizer = load_tokenizer(run.model)
        task = adapted(load_task(run.command, task_options(command, tokenizer)), command)
    except (ValueError, OSError) as error:
        yield f"items unknown: {_line(error)}"
        yield "shapes: one for each prompt bucket"
        whole = min(command.max_length or 10**9, model.config.context_length)
        yield from _caches(model, policies, command.dtype, (whole, 0, command.batch_size))
        return
    check_form(task, command.chat)
    prompts = encode(task, tokenizer, model.config, command.chat, command.max_length)
    found = shapes(make_batches(prompts, task.items, command.batch_size, command.seed))
    tokens = sum(len(prompt.ids) for prompt in prompts)
    cut = sum(prompt.truncated for prompt in prompts)
    yield f"{len(prompts)} items, {tokens:,} prompt tokens, {cut} cut; {len(policies)} policies"
    read = len({(shape.bucket, shape.batch) for shape in found})
    yield f"shapes: {read}; prompts are read once for {len(policies)} policies"
    largest = max(found, key=lambda shape: shape.bucket * shape.batch)
    shape = (largest.bucket, largest.max_new_tokens, largest.batch)
    yield from _caches(model, policies, command.dtype, shape)


def _size(count: float) -> str:
    from eval.report.page import size

    return str(size(count))


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else text[:159] + "…"
