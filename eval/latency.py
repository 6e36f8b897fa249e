"""`python -m eval latency`: time and cache bytes against context, batch and policy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
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
    print_rows,
    with_dtype,
    write_report,
)
from kvjax.checks import COUNT, SEED, Range, check_ranges
from kvjax.runs import write_json
from kvjax.usage import parsed

RANGES = {
    "repeats": COUNT,
    "new_tokens": Range(least=2, most=COUNT.most, whole=True),
    "seed": SEED,
}


@dataclass(frozen=True)
class LatencyCommand:
    """Times prefill and decode on random prompts. Compilation does not count.

    Attributes:
        out: folder for results.json.
        contexts: prompt lengths in tokens.
        batches: numbers of sequences in a batch.
        new_tokens: number of tokens that decode is timed over.
        repeats: number of measurements after a first one that compiles; medians are reported.
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
    dtype: Dtype = None
    json_file: Json = None


def main(argv: Sequence[str]) -> None:
    """Parses the arguments and runs the command."""
    command = parsed(LatencyCommand, "python -m eval latency", argv)
    run(command, ["latency", *argv])


def run(command: LatencyCommand, argv: Sequence[str]) -> None:
    """Measures, prints a table, and writes the result where it was asked for."""
    with alone(command.out):
        report = measure(command, argv)
    hidden = ("gqa_cache_bytes", "repeats")
    rows = [{k: _short(v) for k, v in row.items() if k not in hidden} for row in report["rows"]]
    print_rows(rows, f"{command.model}: medians of {command.repeats}")
    write_report(command.json_file, report)


def measure(command: LatencyCommand, argv: Sequence[str] = ()) -> dict[str, Any]:
    """Measures all combinations of context, batch and policy.

    Returns:
        The content of results.json: model, dtype, new_tokens, rows and the machine. A row has its
        policy, context and batch, and the numbers of `time_one`.

    Raises:
        ValueError: see `check_arguments`; a size below its least, or a prompt that exceeds the
            model's context.
    """
    import kvjax
    from eval.predictions import RESULTS
    from eval.results import environment, facts
    from eval.run import resolve_all
    from kvjax.mesh import named_mesh
    from kvjax.progress import progress_bar

    command = with_dtype(command)
    check_arguments(command)
    check(command)
    model, params = kvjax.load(command.model, command.dtype, named_mesh(command.mesh))
    policies = resolve_all(command.policy or ("full",), model)
    # Refuse what does not fit before the first, perhaps long, measurement.
    longest = max(command.contexts) + command.new_tokens
    if longest > model.config.context_length:
        raise ValueError(
            f"the longest context and new_tokens are {longest} tokens, expected at most "
            f"{model.config.context_length}: the model's context"
        )
    # Measurements, one combination after the other.
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
    # The same entries as other runs, so that the report page shows their origin.
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
        write_json(command.out / RESULTS, report)
    return report


def check(command: LatencyCommand) -> None:
    """Raises ValueError for a size below its least, or nothing to measure."""
    check_ranges(vars(command), RANGES)
    for name in ("contexts", "batches"):
        values = getattr(command, name)
        if not values or min(values) < 1:
            raise ValueError(f"{name} are {values}, expected at least one and all ≥ 1")


def time_one(
    model: Any, params: Any, policy: Any, context: int, batch: int, command: LatencyCommand
) -> dict[str, Any]:
    """Measures one combination.

    Returns:
        time_to_first_token, time_per_token: medians in seconds; a token is a step of the batch.
        repeats: all times.
        cache_bytes: of all sequences after prefill, with room for the new tokens.
        full_cache_bytes, gqa_cache_bytes: the same uncompressed, and before any conversion.
        device_peak_bytes: the most that the device has held since the process began; None where
            the device does not tell.
    """
    import jax
    import numpy as np

    from eval import results
    from eval.prompts import Shape
    from kvjax.cache import cache_bytes
    from kvjax.prefilling import compressions

    # Random ids: time does not depend on the text, and no tokenizer is needed.
    rng = np.random.default_rng(command.seed)
    tokens = rng.integers(0, model.config.vocab_size, (batch, context), dtype=np.int32)
    lengths = np.full(batch, context, np.int32)
    (work,) = compressions(model, params, lengths, [policy], command.new_tokens)
    # The first round compiles all programs and is left out of the medians.
    firsts, steps, held = [], [], 0
    for _ in range(1 + command.repeats):
        start = time.perf_counter()
        state = _read(model, params, tokens, work)
        firsts.append(time.perf_counter() - start)
        held = cache_bytes(state.cache)
        start = time.perf_counter()
        _decode(model, params, state, policy.compression_interval, work)
        # The prefill gives the first token, so decode makes new_tokens − 1.
        steps.append((time.perf_counter() - start) / (command.new_tokens - 1))
    shape, dtype = Shape(context, command.new_tokens, batch), params["embedding"].dtype
    gqa = results.gqa_bytes(model, dtype, shape)
    # CPUs keep no statistics of memory.
    memory = jax.devices()[0].memory_stats() or {}
    return {
        "time_to_first_token": statistics.median(firsts[1:]),
        "time_per_token": statistics.median(steps[1:]),
        "repeats": {"time_to_first_token": firsts[1:], "time_per_token": steps[1:]},
        "cache_bytes": held,
        "full_cache_bytes": batch * results.uncompressed_bytes(model, dtype, shape),
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
    from kvjax.prefilling import read_prompts

    logits, (cache,) = read_prompts(model, params, tokens, [work])
    # Greedy decoding draws nothing, but the state has keys.
    keys = jax.random.split(jax.random.key(0), len(tokens))
    never, greedy = np.asarray((), np.int32), Sampling.create(0.0, 0, 1.0)
    state = first_token(logits, keys, greedy, never, mesh_of(params))
    return jax.block_until_ready(dataclasses.replace(state, cache=cache))


def _decode(model: Any, params: Any, state: Any, interval: int, work: Any) -> None:
    """Decodes all further tokens. Fetching them waits until the device has finished."""
    import numpy as np

    from kvjax.decoding import Sampling, decode

    greedy, never = Sampling.create(0.0, 0, 1.0), np.asarray((), np.int32)
    for _ in decode(model, params, state, greedy, never, work.new_tokens, interval, work.again):
        pass


def _short(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value
