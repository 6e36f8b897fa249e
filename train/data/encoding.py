"""Rows as token ids, and which of them are learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from kvjax.text import ids_after
from train.data.formats import read_messages
from train.data.templates import Piece, chat_pieces, prompt_pieces, uses_chat_template


class Document(NamedTuple):
    """One row of data.

    Attributes:
        tokens: ids, with BOS where the tokenizer begins with one, and EOS at the end of what was
            not a chat.
        learned: where the token is to be predicted from those before it.
    """

    tokens: Int32[np.ndarray, " n"]
    learned: Bool[np.ndarray, " n"]


class Encoder:
    """Encodes rows of one format."""

    def __init__(self, tokenizer: Any, form: str, template: str, learn: str):
        """
        Args:
            tokenizer: of transformers.
            form: one of FORMATS.
            template, learn: as in DataConfig.

        Raises:
            ValueError: documents end with EOS and the tokenizer has none.
        """
        self.tokenizer = tokenizer
        self.form = form
        self.is_chat = uses_chat_template(form, template)
        self.learn_all = learn == "all"
        if not self.is_chat and tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no EOS to end an answer with: set its eos_token")
        bos = tokenizer.bos_token_id
        begins = bos is not None and tokenizer("").input_ids[:1] == [bos]
        self.start = [bos] if begins and not self.is_chat else []
        self.special = {*tokenizer.all_special_ids} | {
            index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        }

    def __call__(self, row: Mapping[str, Any]) -> Document:
        """The row's document.

        A question and its answer are encoded apart, so that the question's ids are those that
        generation starts from.

        Raises:
            ValueError: the row does not fit the format, or the chat template.
        """
        messages = read_messages(self.form, row)
        if self.is_chat:
            pieces = chat_pieces(messages, self.tokenizer)
        else:
            pieces = prompt_pieces(self.form, messages)
        tokens, learned, before = [], [], ""
        for piece in pieces:
            ids = self._ids(piece.text, before)
            tokens += ids
            learned += self._learned(piece, ids)
            before += piece.text
        count = len(self.start)
        if tokens[:count] == self.start:  # the text says BOS itself
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
        """An answer is learned through the token that ends its turn: the blanks that a chat
        template writes after that are no one's to say."""
        end = len(ids)
        if piece.learned and self.is_chat:
            last = max((i + 1 for i, token in enumerate(ids) if token in self.special), default=end)
            if not self.tokenizer.decode(ids[last:]).strip():
                end = last
        return [piece.learned and i < end for i in range(len(ids))]
