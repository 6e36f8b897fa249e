"""`python -m eval perplexity`: of a text, whole or from a compressed prefix."""

from __future__ import annotations

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
    print_report,
    write_json,
)
from eval.predictions import check_folder, write_measured
from kvjax.paths import local_path

KINDS = {
    **dict.fromkeys(("stride", "prefix", "limit", "batch_size"), checks.whole(1)),
    "length": checks.whole(2),
}


@dataclass(frozen=True)
class PerplexityCommand:
    """Perplexity of a text, in chunks of `length` tokens.

    Dense: every token given those before it in its chunk. With --stride, chunks overlap and only
    new tokens count, so that each has length − stride before it. With --prefix, that many tokens
    of a chunk are read and compressed by each policy, and the rest is scored from what is left, but
    for its first token, which the prefill predicts before anything is dropped.

    Attributes:
        text: .txt files, .jsonl files with a "text" a line, packed (.gz, .xz) or not, or
            hub:DATASET:CONFIG:SPLIT; documents are joined with blank lines.
        out: folder for config.json and results.json.
        limit: chunks to read; all of them otherwise.
    """

    model: Model
    text: tuple[str, ...]
    policy: Policies = ()
    out: Path | None = None
    length: int = 2048
    stride: int | None = None
    prefix: int | None = None
    limit: int | None = None
    batch_size: int = 4
    mesh: MeshText = None
    dtype: Dtype = "bfloat16"
    json_file: Json = None


def main(argv: Sequence[str]) -> None:
    """The command with these arguments."""
    command = tyro.cli(PerplexityCommand, prog="python -m eval perplexity", args=list(argv))
    report = measure(command, ["perplexity", *argv])
    print_report(report)
    write_json(command.json_file, report)


def measure(command: PerplexityCommand, argv: Sequence[str] = ()) -> dict[str, Any]:
    """What results.json holds: as of a task, whose metric is perplexity and whose items are tokens.

    Raises:
        ValueError: no text, or settings that do not fit it, the model or each other.
    """
    import numpy as np

    import kvjax
    from eval import losses
    from eval.environment import environment
    from eval.loaded import facts, resolve_all
    from eval.progress import progress_bar
    from eval.texts import read_ids
    from kvjax.identity import array_digest
    from kvjax.mesh import named_mesh

    start = time.monotonic()
    names = command.policy or ("full",)
    check(command)
    stride = command.length if command.stride is None else command.stride
    ids = read_ids(command.text, kvjax.load_tokenizer(command.model))
    rows = losses.chunks(ids, command.length, stride, command.limit)
    model, params = kvjax.load(command.model, command.dtype, named_mesh(command.mesh))
    if command.length > model.config.context_length:
        raise ValueError(
            f"length is {command.length}, expected at most {model.config.context_length}: the "
            "model's context"
        )
    policies = resolve_all(names, model)
    request = _request(command, names, len(rows)) | facts(model, params, policies)
    request["text_ids"] = array_digest(np.asarray(ids))
    check_folder(command.out, request)
    found: list[list[Any]] = [[] for _ in names]
    with progress_bar() as progress:
        bar = progress.add_task("perplexity", total=len(rows) * len(names), items="")
        if command.prefix is None:
            parts = losses.dense(model, params, rows, stride, command.batch_size)
            batches = ((0, part) for part in parts)
        else:
            chosen = command.prefix, list(policies.values()), command.batch_size
            batches = losses.after_prefix(model, params, rows, *chosen)
        for number, part in batches:
            found[number] += part
            progress.update(bar, advance=len(part), items=names[number])
    entries = [
        {"policy": name, "all": losses.perplexity_of(found[number]), "groups": {}}
        | _bytes(command, model, params, policies[name])
        for number, name in enumerate(names)
    ]
    report = {
        "task": "perplexity",
        "metric": "perplexity",
        **request,
        "policies": entries,
        "text_tokens": len(ids),
        "seconds": round(time.monotonic() - start, 1),
        **environment(argv),
    }
    write_measured(command.out, request, report)
    return report


def _request(command: PerplexityCommand, names: Sequence[str], count: int) -> dict[str, Any]:
    return {
        "model": command.model,
        "dtype": command.dtype,
        "policies": list(names),
        "text": [name.rpartition("/")[2] for name in command.text],
        "protocol": "dense" if command.prefix is None else "prefix",
        "length": command.length,
        "stride": command.length if command.stride is None else command.stride,
        "prefix": command.prefix,
        "items": count,
    }


def _bytes(command: PerplexityCommand, model: Any, params: Any, policy: Any) -> dict[str, Any]:
    """Cache bytes of one chunk: after its prefix, with room for the rest of it."""
    from eval import sizes
    from eval.batches import Shape

    dtype = params["embedding"].dtype
    read = command.length if command.prefix is None else command.prefix
    shape = Shape(read, command.length - read, 1)
    full = sizes.uncompressed_bytes(model, dtype, shape)
    compressed = command.prefix is not None
    kept = sizes.kept_tokens(policy, model.config, read, dtype) if compressed else None
    return {
        "cache_bytes": sizes.policy_bytes(model, dtype, policy, shape) if compressed else full,
        "full_cache_bytes": full,
        "gqa_cache_bytes": sizes.gqa_bytes(model, dtype, shape),
        "kept": {} if kept is None else {str(read): kept},
        "truncated": 0,
    }


def check(command: PerplexityCommand) -> None:
    """Raises ValueError for settings without a meaning, or that do not fit each other."""
    check_arguments(command)
    for name in command.text:
        local_path(name, "text")
    names = ("length", "stride", "prefix", "limit", "batch_size")
    checks.check(KINDS, **{name: getattr(command, name) for name in names})
    if command.prefix is None and (command.policy or ("full",)) != ("full",):
        raise ValueError("policies compress a prefix: give --prefix TOKENS, or no --policy")
    if command.prefix is not None and command.stride is not None:
        raise ValueError("got --prefix and --stride, expected one of them")
