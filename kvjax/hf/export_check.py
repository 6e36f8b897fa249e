"""Whether an exported directory is whole: every loader finds what its config.json promises."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvjax.hf.checkpoint import INDEX, SINGLE, Checkpoint, scan
from kvjax.hf.deepseek.stock import stock_tensors
from kvjax.hf.json_file import read_json
from kvjax.hf.load import load_tokenizer
from kvjax.paths import local_path

GENERATION = "generation_config.json"
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
PROBE = "Hello  world!\n\tThe 3 naïve cafés: x = {1, 2};  你好 🙂 <s> </s> <|im_end|>"


def check_export(path: str | Path, source: str | Path | None = None) -> dict[str, Any]:
    """Looks through a directory that `kvjax.save(layout="deepseek_v3")` wrote; no tensor is read.

    Names, shapes and dtypes are compared with what transformers' class expects of this
    config.json, the index with the files, the special tokens of config.json,
    generation_config.json and tokenizer with each other.

    Args:
        source: directory of the model that was exported; its tokenizer must give the same ids.

    Returns:
        tensors, files, bytes: counts of the weights. tokenizer: its class. eos: ids that end a
        text. notes: what is allowed and worth knowing.

    Raises:
        ValueError: one error lists everything that is wrong.
    """
    directory = local_path(path, "the export")
    raw = _read(directory / "config.json")
    if raw.get("architectures") != ["DeepseekV3ForCausalLM"]:
        raise ValueError(
            f"{directory} holds {raw.get('architectures')}, expected ['DeepseekV3ForCausalLM']"
        )
    found, expected = scan(directory), stock_tensors(raw)
    problems = [
        *found.problems,
        *_tensor_problems(found, expected, raw["dtype"]),
        *_file_problems(directory, found),
    ]
    eos = _ids(_read(directory / GENERATION).get("eos_token_id"))
    if eos != _ids(raw.get("eos_token_id")):
        problems.append(f"{GENERATION} ends texts with {eos}, config.json with another")
    notes: list[str] = [] if eos else ["no token ends a text"]
    name = None
    if any((directory / file).is_file() for file in TOKENIZER):
        tokenizer = load_tokenizer(directory)
        name = type(tokenizer).__name__
        problems += _tokenizer_problems(tokenizer, raw, source)
        if tokenizer.eos_token_id not in eos:
            notes.append(f"the tokenizer's EOS is {tokenizer.eos_token_id}, the model's {eos}")
    else:
        notes.append("no tokenizer")
    if problems:
        raise ValueError(f"{directory} is not whole: {'; '.join(problems)}")
    return {
        "tensors": len(found.tensors),
        "files": len({tensor.path for tensor in found.tensors.values()}),
        "bytes": sum(tensor.nbytes for tensor in found.tensors.values()),
        "tokenizer": name,
        "eos": eos,
        "notes": notes,
    }


def _tensor_problems(found: Checkpoint, expected: dict, dtype: str) -> Iterator[str]:
    stored = found.tensors
    for name, shape in expected.items():
        if name in found.lost:
            continue
        if name not in stored:
            yield f"missing {name}"
        elif stored[name].shape != shape:
            yield f"{name} has shape {stored[name].shape}, expected {shape}"
        elif stored[name].dtype.name != dtype:
            yield f"{name} is {stored[name].dtype.name}, config.json says {dtype}"
    yield from (f"unexpected {name}" for name in sorted(stored.keys() - expected.keys()))


def _file_problems(directory: Path, found: Checkpoint) -> Iterator[str]:
    """Some engines read every safetensors file, whatever the index says, and some go by it."""
    files = {path.name for path in directory.glob("*.safetensors")}
    if SINGLE in files or not (directory / INDEX).is_file():
        yield from (f"{name} belongs to no index" for name in sorted(files - {SINGLE}))
        if (directory / INDEX).exists():
            yield f"there are {SINGLE} and an index, expected one of them"
        return
    index = _read(directory / INDEX)
    named = {name: file for name, file in index["weight_map"].items() if isinstance(file, str)}
    yield from (f"{name} belongs to no index" for name in sorted(files - set(named.values())))
    unmapped = found.tensors.keys() - named.keys()
    yield from (f"the index does not name {name}" for name in sorted(unmapped))
    total = sum(tensor.nbytes for tensor in found.tensors.values())
    said = (index.get("metadata") or {}).get("total_size")
    if not found.problems and said != total:
        yield f"the index says {said} bytes, the files hold {total}"


def _tokenizer_problems(tokenizer: Any, raw: dict, source: str | Path | None) -> Iterator[str]:
    if len(tokenizer) > raw["vocab_size"]:
        yield f"the tokenizer has {len(tokenizer)} tokens, the model {raw['vocab_size']}"
    # Without that file a directory of ours does not say which class its tokenizer has.
    if source is None or not (local_path(source, "source") / "tokenizer_config.json").is_file():
        return
    was, now = (t(PROBE)["input_ids"] for t in (load_tokenizer(source), tokenizer))
    if was != now:
        yield f"the tokenizer reads {now} where that of {source} reads {was}"


def _read(path: Path) -> dict[str, Any]:
    return read_json(path)[1]


def _ids(value: Any) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)
