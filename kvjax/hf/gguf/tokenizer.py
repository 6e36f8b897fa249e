"""The tokenizer of a GGUF file, made of its vocabulary and its merges.

`AutoTokenizer.from_pretrained(…, gguf_file=…)` of transformers 5.24 needs torch to read the file,
and seconds. So the file is read here, and transformers makes the tokenizer of what was read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvjax.hf.gguf.header import Texts, read_header

Metadata = Mapping[str, Any]

VOCABULARY = {
    "model": "tokenizer_type",
    "pre": "pre_tokenizer_type",
    "tokens": "tokens",
    "scores": "scores",
    "token_type": "token_type",
    "merges": "merges",
}
"""Keys below tokenizer.ggml → transformers' names of them."""
SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
SPACE = "▁"  # in the words of sentencepiece
BYTES, PIECES = "gpt2", "llama"
"""Kinds of vocabularies: byte-level BPE, and sentencepiece."""
DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""Values of tokenizer.ggml.pre that split as GPT-2, with each digit alone."""
PLAIN = (None, "default", "gpt-2", "gpt3", "jais", "mpt", "olmo", "phi-2", "trillion")
"""Values that split as GPT-2."""


def load_tokenizer(path: Path) -> Any:
    """The fast tokenizer of a GGUF file, with its special tokens and its chat template.

    Raises:
        ValueError: the file has no tokenizer, or one of a kind that transformers cannot make.
    """
    metadata = read_header(path).metadata
    try:
        return _tokenizer(metadata)
    except Exception as error:  # a damaged vocabulary may raise anything, in any number of lines
        line = " ".join(str(error).split())
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise ValueError(f"cannot read the tokenizer of {path}: {kind}{line}") from error


def _tokenizer(metadata: Metadata) -> Any:
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf import convert_gguf_tokenizer

    content = {
        name: metadata[f"tokenizer.ggml.{key}"]
        for key, name in VOCABULARY.items()
        if f"tokenizer.ggml.{key}" in metadata
    }
    lists = {key: list(value) for key, value in content.items() if isinstance(value, Texts)}
    content |= lists
    if not content.get("tokens"):
        raise ValueError("the file has no tokenizer.ggml.tokens")
    _check_split(content)
    core, _ = convert_gguf_tokenizer(metadata["general.architecture"], content)
    if content.get("pre_tokenizer_type") in DIGITS and content["tokenizer_type"] == BYTES:
        core.pre_tokenizer = _single_digits()
    if metadata.get("tokenizer.ggml.add_space_prefix") is False:
        _without_space_prefix(core)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        chat_template=metadata.get("tokenizer.chat_template"),
        **_special_tokens(metadata, content["tokens"]),
        **_added_ends(metadata, content["tokenizer_type"]),
    )


def _check_split(content: Mapping[str, Any]) -> None:
    """Raises ValueError for a way to split texts that nobody here knows: ids would be wrong."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    kind, split = content.get("tokenizer_type"), content.get("pre_tokenizer_type")
    if kind not in (BYTES, PIECES):
        raise ValueError(f"tokenizer.ggml.model is {kind!r}, expected {BYTES!r} or {PIECES!r}")
    if kind == BYTES and split not in (*DIGITS, *PLAIN, *GGUF_PRE_TOKENIZER_SPLITS):
        raise ValueError(
            f"tokenizer.ggml.pre is {split!r}, which transformers does not know: put the model's "
            "tokenizer.json beside the file, and give the folder as the model"
        )


def _single_digits() -> Any:
    from tokenizers import pre_tokenizers

    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def _without_space_prefix(core: Any) -> None:
    """Takes away the space that transformers puts before any text of a sentencepiece vocabulary."""
    from tokenizers import decoders, normalizers

    tokens = core.encode("a", add_special_tokens=False).tokens
    if not tokens or not tokens[0].startswith(SPACE):
        return
    core.pre_tokenizer = None
    core.normalizer = normalizers.Replace(" ", SPACE)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence(steps)


def _special_tokens(metadata: Metadata, tokens: list[str]) -> dict[str, str | None]:
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for key, name in SPECIAL.items()}
    return {
        name: tokens[index] if index is not None and index < len(tokens) else None
        for name, index in ids.items()
    }


def _added_ends(metadata: Metadata, kind: str) -> dict[str, bool]:
    """Whether BOS comes before a text and EOS after it; llama.cpp's rule where the file is mute."""
    begin = metadata.get("tokenizer.ggml.add_bos_token", kind == PIECES)
    return {
        "add_bos_token": bool(begin),
        "add_eos_token": bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
    }
