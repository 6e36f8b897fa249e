"""Rows as token ids: which tokens are learned, and which rows fit into a sequence."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from kvjax.data_files import Rows, open_rows
from kvjax.text import ids_after
from train.data.config import DataConfig, SourceConfig
from train.data.formats import Piece, chat_pieces, prompt_pieces, read_messages, uses_chat_template

log = logging.getLogger(__name__)


class Document(NamedTuple):
    """One row of data.

    Attributes:
        tokens: ids. Begins with BOS if the tokenizer adds one; ends with EOS unless it is a chat.
        learned: True where the loss counts the prediction of the token.
    """

    tokens: Int32[np.ndarray, " n"]
    learned: Bool[np.ndarray, " n"]


class Encoder:
    """Turns rows of one format into documents."""

    def __init__(self, tokenizer: Any, form: str, template: str, learn: str):
        """
        Args:
            tokenizer: of transformers.
            form: one of FORMATS.
            template, learn: as in DataConfig.

        Raises:
            ValueError: documents end with EOS, and the tokenizer has no EOS.
        """
        self.tokenizer = tokenizer
        self.form = form
        self.is_chat = uses_chat_template(form, template)
        self.learn_all = learn == "all"
        if not self.is_chat and tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no EOS to end an answer with: set its eos_token")
        # Some tokenizers have a BOS token and don't begin texts with it.
        bos = tokenizer.bos_token_id
        begins = bos is not None and tokenizer("").input_ids[:1] == [bos]
        self.start = [bos] if begins and not self.is_chat else []
        self.special = {*tokenizer.all_special_ids} | {
            index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        }

    def __call__(self, row: Mapping[str, Any]) -> Document:
        """The document of a row.

        Raises:
            ValueError: the row does not fit the format or the chat template.
        """
        messages = read_messages(self.form, row)
        if self.is_chat:
            pieces = chat_pieces(messages, self.tokenizer)
        else:
            pieces = prompt_pieces(self.form, messages)
        # Each piece is encoded alone: generation will start from the same ids of the question.
        tokens, learned, before = [], [], ""
        for piece in pieces:
            ids = self._ids(piece.text, before)
            tokens += ids
            learned += self._learned(piece, ids)
            before += piece.text
        count = len(self.start)
        if tokens[:count] == self.start:  # the text itself begins with BOS
            tokens, learned = tokens[count:], learned[count:]
        tokens, learned = self.start + tokens, [False] * count + learned
        if not self.is_chat:
            tokens.append(self.tokenizer.eos_token_id)
            learned.append(True)
        return Document(np.array(tokens, np.int32), np.array(learned) | self.learn_all)

    def _ids(self, text: str, before: str) -> list[int]:
        if before:
            return ids_after(self.tokenizer, text, before)
        if not text:
            return []
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def _learned(self, piece: Piece, ids: list[int]) -> list[bool]:
        """Which ids of a piece are learned: an answer up to the token that ends its turn.

        Blanks that a chat template writes after that token are not part of the answer.
        """
        end = len(ids)
        if piece.learned and self.is_chat:
            # The last special token ends the turn, unless text follows it.
            last = max((i + 1 for i, token in enumerate(ids) if token in self.special), default=end)
            if not self.tokenizer.decode(ids[last:]).strip():
                end = last
        return [piece.learned and i < end for i in range(len(ids))]


class Documents:
    """Random access to the documents of one source.

    All rows are encoded once, so that bad rows are found before training starts. The ids stay in
    memory, at five bytes a token: every epoch would otherwise encode the texts again.

    Attributes:
        path: of the source.
        rows: number of rows, at most `max_rows`.
        too_long: number of rows of more than T tokens, which are dropped or cut to T.
        dropped: number of rows that are left out: too long, or without anything to learn in their
            first T tokens.
        kept: int64 [n], indices of the rows that are documents.
        lengths: int32 [n], number of tokens of each document.
        learned: int32 [n], number of learned tokens of each document.
        largest_id: largest token id in all documents.
    """

    def __init__(self, path: str, rows: Rows, encode: Encoder, config: DataConfig):
        """Encodes all rows.

        Raises:
            ValueError: a bad row, named by file and line; or no row is left.
        """
        self.path = path
        self.rows = min(len(rows), config.max_rows or len(rows))
        T, full, documents = config.sequence_length, np.zeros(self.rows, np.int64), []
        for row in range(self.rows):
            document = _encoded(rows, row, encode)
            full[row] = len(document.tokens)
            # Copies: a slice would keep the whole document in memory.
            documents.append(Document(*(part[:T].copy() for part in document)))
        # Drop rows without anything to learn, and long rows unless they are to be cut. The first
        # token is not predicted.
        learned = np.array([document.learned[1:].sum() for document in documents], np.int32)
        too_long = full > T
        drop = learned == 0
        if config.long_rows == "drop":
            drop |= too_long
        if drop.all():
            raise ValueError(
                f"{path}: got {self.rows} rows of {full.min()} to {full.max()} tokens, expected "
                f"some with an answer within sequence_length={T}: raise it, or set "
                "long_rows='truncate'"
            )
        self.too_long, self.dropped = int(too_long.sum()), int(drop.sum())
        self.kept = np.flatnonzero(~drop)
        self.lengths = np.minimum(full, T).astype(np.int32)[self.kept]
        self.learned = learned[self.kept]
        self._documents = [documents[row] for row in self.kept]
        self.largest_id = max(int(document.tokens.max()) for document in self._documents)
        if self.too_long or self.dropped:
            log.warning(
                "%s: %d of %d rows have more than %d tokens; %d rows are left out",
                *(path, self.too_long, self.rows, T, self.dropped),
            )

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Document `index` of the kept ones: tokens int32 [n] and learned bool [n], n ≤ T."""
        return self._documents[index]._asdict()


def _encoded(rows: Rows, row: int, encode: Encoder) -> Document:
    values = rows[row]
    try:
        return encode(values)
    except ValueError as error:
        raise ValueError(f"{rows.where(row)}: {error}") from error


def open_documents(config: DataConfig, tokenizer: Any) -> tuple[Documents, ...]:
    """The documents of every source. Sources that were opened before are not read again.

    Raises:
        ValueError: as in `open_rows`, `Encoder` and `Documents`.
    """
    # These settings don't change documents: leave them out of the cache's key.
    config = dataclasses.replace(config, batch_size=1, epochs=1, seed=0)
    return tuple(
        _open(
            dataclasses.replace(config, sources=(dataclasses.replace(source, weight=1.0),)),
            tokenizer,
            str(tokenizer.chat_template),
            _stamp(source),
        )
        for source in config.sources
    )


def check_documents(
    config: DataConfig, tokenizer: Any, vocab_size: int, context_length: int
) -> None:
    """Raises ValueError for documents that a model cannot read; names their sources.

    Without this check there would be no error: on a device, an id beyond the vocabulary silently
    gets the embedding of the last token.
    """
    problems = []
    for source in open_documents(config, tokenizer):
        if source.largest_id >= vocab_size:
            problems.append(
                f"{source.path}: the tokenizer gives token {source.largest_id}, expected at most "
                f"{vocab_size - 1}: it is not the model's"
            )
        if source.lengths.max() > context_length:
            problems.append(
                f"{source.path}: got a document of {source.lengths.max()} tokens, expected at most "
                f"{context_length}, the model's context: lower sequence_length"
            )
    if problems:
        raise ValueError("; ".join(problems))


def _stamp(source: SourceConfig) -> tuple[int, int] | None:
    """Time and size of a local file, which change when its content does."""
    path = Path(source.path)
    if not path.is_file():
        return None
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


@functools.lru_cache(maxsize=8)
def _open(config: DataConfig, tokenizer: Any, chat_template: str, stamp: Any) -> Documents:
    del chat_template, stamp  # only part of the cache's key
    (source,) = config.sources
    encode = Encoder(tokenizer, source.format, config.template, config.learn)
    return Documents(source.path, open_rows(source.path, source.split), encode, config)
