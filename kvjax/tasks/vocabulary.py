"""From text to token ids: all that the tasks ask of a tokenizer, and the project's own one."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, SupportsIndex, runtime_checkable

from kvjax.tasks import words
from kvjax.text import ids_after


@runtime_checkable
class Vocabulary(Protocol):
    """Turns a piece of text into ids, without special tokens, the same wherever it stands."""

    @property
    def bos_id(self) -> int | None:
        """Starts every prompt; None for models without one."""
        ...

    @property
    def size(self) -> int:
        """V."""
        ...

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class WordVocabulary:
    """Word-level vocabulary: one id a word, words separated by single spaces.

    Attributes:
        tokens: all tokens, their index is their id; the first four are pad, bos, eos, unknown.
    """

    tokens: tuple[str, ...] = words.ALL
    _ids: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ids = {token: index for index, token in enumerate(self.tokens)}
        if len(ids) != len(self.tokens):
            twice = sorted({token for token in self.tokens if self.tokens.count(token) > 1})
            raise ValueError(f"tokens stand twice in the vocabulary: {', '.join(twice)}")
        if self.tokens[:4] != words.SPECIAL:
            raise ValueError(f"got first tokens {self.tokens[:4]}, expected {words.SPECIAL}")
        object.__setattr__(self, "_ids", ids)

    pad_id = 0
    bos_id = 1
    eos_id = 2
    unknown_id = 3

    @property
    def size(self) -> int:
        """V."""
        return len(self.tokens)

    def encode(self, text: str) -> list[int]:
        """Ids of the space-separated words of `text`; unknown words get `unknown_id`."""
        return [self._ids.get(word, self.unknown_id) for word in text.split()]

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The words, joined by spaces."""
        return " ".join(self.tokens[index] for index in ids)


@dataclass(frozen=True)
class TokenizerVocabulary:
    """Adapts a tokenizer of transformers to `Vocabulary`."""

    tokenizer: Any

    @property
    def bos_id(self) -> int | None:
        """The token that starts a prompt, if the tokenizer has one."""
        return self.tokenizer.bos_token_id

    @property
    def size(self) -> int:
        """V."""
        return len(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        """Ids of a piece of text as it stands within a sentence: after a space."""
        return ids_after(self.tokenizer, f" {text}")

    @functools.cached_property
    def ordinary_ids(self) -> list[int]:
        """All ids except those of special and added tokens."""
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        return [index for index in range(self.size) if index not in special]
