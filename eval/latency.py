"""`python -m eval latency`: time and cache bytes against context, batch and policy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from eval import checks
from eval.command import (
    Dtype,
    Json,
    MeshText,
    Model,
    Policies,
    check_arguments,
    print_rows,
    write_json,
)

KINDS = {"repeats": checks.whole(1), "new_tokens": checks.whole(2), "seed": checks.whole(0)}


@dataclass(frozen=True)
class LatencyCommand:
    """Times prefill and decode on random prompts; compilation is not counted.

    Attributes:
        out: folder for results.json.
        contexts: prompt lengths in tokens.
        batches: sequences at a time.
        new_tokens: tokens that decode is timed over.
        repeats: of each measurement, after one that compiles; medians are reported.
    """

    model: Model
    policy: Policies = ()
    out: Path | None = None
    contexts: tuple[int, ...] = (1024,)
    batches: tuple[int, ...] = (1,)
    new_tokens: int = 32
    repeats: int = 5
    seed: int = 0
    mesh: MeshText = None
    dtype: Dtype = "bfloat16"
    json_file: Json = None


def main(argv: Sequence[str]) -> None:
    """The command with these arguments."""
    command = tyro.cli(LatencyCommand, prog="python -m eval latency", args=list(argv))
    report = measure(command, ["latency", *argv])
    hidden = ("gqa_cache_bytes", "repeats")
    rows = [{k: _short(v) for k, v in row.items() if k not in hidden} for row in report["rows"]]
    print_rows(rows, f"{command.model}: medians of {command.repeats}")
    write_json(command.json_file, report)


def measure(command: LatencyCommand, argv: Sequence[str] = ()) -> dict[str, Any]:
    """All combinations.

    Returns:
        model, dtype, new_tokens, repeats, rows and where they were measured; each row is what
        `time_one` returns, with its policy, context and batch.

    Raises:
        ValueError: see `check_arguments`; a size below its least, or a prompt that exceeds the
            model's context.
    """
    import kvjax
    from eval.environment import environment
    from eval.loaded import facts, resolve_all
    from eval.predictions import RESULTS
    from eval.predictions import write_json as write_whole
    from eval.progress import progress_bar
    from kvjax.mesh import named_mesh

    check_arguments(command)
    check(command)
    model, params = kvjax.load(command.model, command.dtype, named_mesh(command.mesh))
    policies = resolve_all(command.policy or ("full",), model)
    longest = max(command.contexts) + command.new_tokens
    if longest > model.config.context_length:
        raise ValueError(
            f"the longest context and new_tokens are {longest} tokens, expected at most "
            f"{model.config.context_length}: the model's context"
        )
    cases = [
        (context, batch, name)
        for context in command.contexts
        for batch in command.batches
        for name in policies
    ]
    rows = []
    with progress_bar() as progress:
        bar = progress.add_task("latency", total=len(cases), items="")
        for context, batch, name in cases:
            label = {"policy": name, "context": context, "batch": batch}
            measured = time_one(model, params, policies[name], context, batch, command)
            rows.append({**label, **measured})
            progress.update(bar, advance=1, items=name)
    report = {
        "task": "latency",
        "model": command.model,
        **facts(model, params, policies),
        "new_tokens": command.new_tokens,
        "seed": command.seed,
        "rows": rows,
        **environment(argv),
    }
    if command.out is not None:
        command.out.mkdir(parents=True, exist_ok=True)
        write_whole(command.out / RESULTS, report)
    return report


def check(command: LatencyCommand) -> None:
    """Raises ValueError for a size below its least, or nothing to measure."""
    checks.check(KINDS, repeats=command.repeats, new_tokens=command.new_tokens, seed=command.seed)
    for name in ("contexts", "batches"):
        values = getattr(command, name)
        if not values or min(values) < 1:
            raise ValueError(f"{name} are {values}, expected at least one and all ≥ 1")


def time_one(
    model: Any, params: Any, policy: Any, context: int, batch: int, command: LatencyCommand
) -> dict[str, Any]:
    """One combination.

    Returns:
        time_to_first_token and time_per_token in seconds, medians: a token is one step of the
        whole batch; repeats: all times; cache_bytes: of all sequences, their largest size: after
        prefill, with room for the new tokens; full_cache_bytes and gqa_cache_bytes: the same
        uncompressed, and before any conversion; device_peak_bytes: the most that the device has
        held since the process began, None where it does not say.
    """
    import jax
    import numpy as np

    from eval import sizes
    from eval.batches import Shape
    from kvjax.cache import cache_bytes
    from kvjax.prefill import compressions

    rng = np.random.default_rng(command.seed)
    tokens = rng.integers(0, model.config.vocab_size, (batch, context), dtype=np.int32)
    lengths = np.full(batch, context, np.int32)
    (work,) = compressions(model, params, lengths, [policy], command.new_tokens)
    firsts, steps, held = [], [], 0
    for _ in range(1 + command.repeats):
        start = time.perf_counter()
        state = _read(model, params, tokens, work)
        firsts.append(time.perf_counter() - start)
        held = cache_bytes(state.cache)
        start = time.perf_counter()
        _decode(model, params, state, policy.every, work)
        steps.append((time.perf_counter() - start) / (command.new_tokens - 1))
    shape, dtype = Shape(context, command.new_tokens, batch), params["embedding"].dtype
    gqa = sizes.gqa_bytes(model, dtype, shape)
    memory = jax.devices()[0].memory_stats() or {}
    return {
        "time_to_first_token": statistics.median(firsts[1:]),
        "time_per_token": statistics.median(steps[1:]),
        "repeats": {"time_to_first_token": firsts[1:], "time_per_token": steps[1:]},
        "cache_bytes": held,
        "full_cache_bytes": batch * sizes.uncompressed_bytes(model, dtype, shape),
        "gqa_cache_bytes": None if gqa is None else batch * gqa,
        "device_peak_bytes": memory.get("peak_bytes_in_use"),
    }


def _read(model: Any, params: Any, tokens: Any, work: Any) -> Any:
    """Prefill and the first token, as `kvjax.generate` does it."""
    import dataclasses

    import jax
    import numpy as np

    from kvjax.decoding import Sampling, first_token
    from kvjax.mesh import mesh_of
    from kvjax.prefill import read_prompts

    logits, (cache,) = read_prompts(model, params, tokens, [work])
    keys = jax.random.split(jax.random.key(0), len(tokens))
    never, greedy = np.asarray((), np.int32), Sampling.create(0.0, 0, 1.0)
    state = first_token(logits, keys, greedy, never, mesh_of(params))
    return jax.block_until_ready(dataclasses.replace(state, cache=cache))


def _decode(model: Any, params: Any, state: Any, every: int, work: Any) -> None:
    """All further tokens; they are fetched, so that they are finished."""
    import numpy as np

    from kvjax.decoding import Sampling, decode

    greedy, never = Sampling.create(0.0, 0, 1.0), np.asarray((), np.int32)
    for _ in decode(model, params, state, greedy, never, work.new_tokens, every, work.again):
        pass


def _short(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value
