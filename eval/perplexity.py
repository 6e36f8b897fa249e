"""`python -m eval perplexity`: perplexity of a text, dense or from a compressed prefix."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from eval.command import (
    Dtype,
    Json,
    MeshText,
    Model,
    Policies,
    alone,
    check_arguments,
    print_report,
    with_dtype,
    write_report,
)
from eval.predictions import write_measured
from eval.report.runs import measured
from eval.rows import hub_rows, read_rows
from kvjax.checks import COUNT, Range, check_ranges, optional, token_ids
from kvjax.data_files import id_rows
from kvjax.paths import local_path
from kvjax.text import prompt_ids
from kvjax.text_files import read_text
from kvjax.usage import parsed

HUB = "hub:"

RANGES = {
    **dict.fromkeys(("stride", "prefix", "limit", "batch_size"), optional(COUNT)),
    "length": Range(least=2, most=COUNT.most, whole=True, optional=True),
}


@dataclass(frozen=True)
class PerplexityCommand:
    """Perplexity of a text, in chunks of `length` tokens.

    Dense: every token is scored given those before it in its chunk. With --stride, chunks overlap
    and only new tokens count, so each has length − stride tokens before it. With --prefix, that
    many tokens of a chunk are read and compressed by each policy, and the others are scored from
    the compressed cache, the first of them too.

    Attributes:
        text: .txt files, .jsonl files with a "text" a line, packed (.gz, .xz) or not, or
            hub:DATASET:CONFIG:SPLIT; documents are joined with blank lines. Or one .npy file of
            token ids [S, T].
        out: folder for config.json and results.json.
        limit: number of chunks to read; all by default.
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
    dtype: Dtype = None
    json_file: Json = None


def main(argv: Sequence[str]) -> None:
    """Parses the arguments and runs the command."""
    command = parsed(PerplexityCommand, "python -m eval perplexity", argv)
    run(command, ["perplexity", *argv])


def run(command: PerplexityCommand, argv: Sequence[str]) -> None:
    """Measures, prints a table, and writes the result where it was asked for."""
    with alone(command.out):
        report = measure(command, argv)
    print_report(report)
    write_report(command.json_file, report)


def measure(command: PerplexityCommand, argv: Sequence[str] = ()) -> dict[str, Any]:
    """The content of results.json, as for a task. Its metric is perplexity, its items are tokens.

    Raises:
        ValueError: no text, or settings that do not fit it, the model or each other.
    """
    import kvjax
    from eval import likelihood
    from eval.results import environment, facts
    from eval.run import resolve_all
    from kvjax.identity import array_digest
    from kvjax.mesh import named_mesh
    from kvjax.progress import progress_bar

    # The text and its chunks; problems of the text show before weights are loaded.
    start, command = time.monotonic(), with_dtype(command)
    names = command.policy or ("full",)
    check(command)
    stride = command.length if command.stride is None else command.stride
    ids = read_ids(command.text, kvjax.load_tokenizer(command.model))
    rows = chunks(ids, command.length, stride, command.limit)
    model, params = kvjax.load(command.model, command.dtype, named_mesh(command.mesh))
    if command.length > model.config.context_length:
        raise ValueError(
            f"length is {command.length}, expected at most {model.config.context_length}: the "
            "model's context"
        )
    ids = token_ids(ids, model.config.vocab_size, command.text[0])
    # config.json; a folder of another measurement is refused.
    policies = resolve_all(names, model)
    request = _request(command, names, len(rows)) | facts(model, params, policies)
    request["text_ids"] = array_digest(np.asarray(ids))
    if (earlier := measured(command.out, request)) is not None:
        return earlier
    # Losses of every chunk, under each policy.
    found: list[list[Any]] = [[] for _ in names]
    with progress_bar() as progress:
        bar = progress.add_task("perplexity", total=len(rows) * len(names), items="")
        if command.prefix is None:
            parts = likelihood.dense_losses(model, params, rows, stride, command.batch_size)
            batches = ((0, part) for part in parts)
        else:
            chosen = command.prefix, list(policies.values()), command.batch_size
            batches = likelihood.losses_after_prefix(model, params, rows, *chosen)
        for number, part in batches:
            found[number] += part
            progress.update(bar, advance=len(part), items=names[number])
    entries = [
        {"policy": name, "all": perplexity_of(found[number]), "groups": {}}
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


def chunks(
    ids: Int[np.ndarray, " S"], length: int, stride: int, count: int | None = None
) -> Int[np.ndarray, "C T"]:
    """Chunks of `length` tokens that start `stride` tokens apart. An incomplete one is left out.

    Args:
        count: at most this many chunks; None: all.

    Raises:
        ValueError: a text that is shorter than `length`, or a stride that leaves tokens out.
    """
    if not 2 <= length <= len(ids):
        raise ValueError(f"length is {length}, expected 2 to {len(ids)}: the tokens of the text")
    if not 1 <= stride <= length:
        raise ValueError(f"stride is {stride}, expected 1 to {length}: the length")
    # A view: overlapping chunks share the memory of the ids.
    return np.lib.stride_tricks.sliding_window_view(ids, length)[::stride][:count]


def perplexity_of(losses: list[np.ndarray]) -> dict[str, Any]:
    """exp of the mean loss of all tokens, as the "all" of an entry in results.json.

    The standard error treats rows, not tokens, as independent (delta method): perplexity times the
    standard error of the rows' means; None for one row.
    """
    every = np.concatenate(losses).astype(np.float64)
    value = math.exp(every.mean())
    n, error = len(losses), None
    if n > 1:
        # Tokens of one chunk depend on each other; chunks are nearly independent.
        means = [float(np.mean(row, dtype=np.float64)) for row in losses]
        error = value * float(np.std(means, ddof=1)) / math.sqrt(n)
    return {"score": value, "standard_error": error, "items": int(every.size)}


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
    """Cache bytes of one chunk after its prefix, with room for the other tokens."""
    from eval import results
    from eval.prompts import Shape

    dtype = params["embedding"].dtype
    read = command.length if command.prefix is None else command.prefix
    shape = Shape(read, command.length - read, 1)
    full = results.uncompressed_bytes(model, dtype, shape)
    # A dense run holds no cache; its bytes are those of an uncompressed one.
    compressed = command.prefix is not None
    kept = results.kept_tokens(policy, model.config, read, dtype) if compressed else None
    return {
        "cache_bytes": results.policy_bytes(model, dtype, policy, shape) if compressed else full,
        "full_cache_bytes": full,
        "gqa_cache_bytes": results.gqa_bytes(model, dtype, shape),
        "kept": {} if kept is None else {str(read): kept},
        "truncated": 0,
    }


def check(command: PerplexityCommand) -> None:
    """Raises ValueError for settings that are out of range or do not fit each other."""
    check_arguments(command)
    for name in command.text:
        local_path(name, "text")
    check_ranges(vars(command), RANGES)
    if command.prefix is None and (command.policy or ("full",)) != ("full",):
        raise ValueError("policies compress a prefix: give --prefix TOKENS, or no --policy")
    if command.prefix is not None and command.stride is not None:
        raise ValueError("got --prefix and --stride, expected one of them")


def read_ids(names: Sequence[str], tokenizer: Any) -> Int[np.ndarray, " S"]:
    """Token ids of all documents of all texts, joined with blank lines.

    Args:
        names: .txt files, one document each; .jsonl files with a document in each line's "text".
            Both may be packed (.gz, .xz). Or "hub:DATASET:CONFIG:SPLIT" with a column "text". Or a
            single .npy file of token ids [S, T], whose rows are joined as they are.

    Raises:
        ValueError: a missing file, a line without a document (named), no text at all, or an .npy
            file of something else or beside other texts.
    """
    stored = [name for name in names if name.endswith(".npy")]
    if stored:
        if len(names) > 1:
            raise ValueError(f"got {len(names)} texts with {stored[0]}, expected that file alone")
        return id_rows(Path(stored[0])).reshape(-1)
    text = "\n\n".join(document for name in names for document in documents(name))
    if not text.strip():
        raise ValueError(f"no text in {', '.join(names) or 'no files'}")
    return np.asarray(prompt_ids(tokenizer, text), np.int32)


def documents(name: str) -> Iterator[str]:
    """The documents of one text; see `read_ids`."""
    if name.startswith(HUB):
        parts = name.removeprefix(HUB).split(":")
        if len(parts) != 3:
            raise ValueError(f"got text {name!r}, expected hub:DATASET:CONFIG:SPLIT")
        yield from (row.text("text") for row in hub_rows(*parts))
    elif ".jsonl" in Path(name).suffixes:
        yield from (row.text("text") for row in read_rows(Path(name)))
    else:
        yield read_text(Path(name))
