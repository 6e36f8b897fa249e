"""The text that new tokens add to a prompt: whole, or piece by piece as the tokens arrive.

A decoder treats its first token specially: sentencepiece's drops a space there. So new tokens are
decoded together with tokens before them, and the text of those is cut off.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

UNKNOWN = "\ufffd"
"""What a decoder writes for bytes that are not UTF-8, such as half of a character."""

CHARACTER = 4  # bytes of the longest UTF-8 character; a token has at least one
LONGEST = 32  # tokens that may wait for the rest of a character
TAIL = 16  # tokens at the end of a prompt that are decoded first


def added_text(tokenizer: Any, prompt_ids: Sequence[int], new_ids: Sequence[int]) -> str:
    """The text that `new_ids` add after `prompt_ids`.

    Special tokens are left out. Spaces are kept as the tokens say, whatever the tokenizer's
    clean_up_tokenization_spaces. After a prompt without text, such as BOS alone, the new tokens
    begin the text, and the decoder may drop its first space.

    Args:
        tokenizer: of transformers.
    """
    stream = TextStream(tokenizer, prompt_ids)
    return stream.add(new_ids) + stream.end()


class TextStream:
    """`added_text` in pieces, which together are the same text.

    No piece ends within a character. A token costs the decoding of a few tokens, not of all.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int]):
        self._tokenizer = tokenizer
        self._before: list[int] = []  # the last tokens whose text is out
        self._before_text = ""
        self._waiting: list[int] = []  # tokens whose text is not out yet
        self._said = ""
        self.add(_tail(tokenizer, prompt_ids))
        # A prompt can end within a character, which belongs to the answer if that completes it.
        self._said = self._text_of_waiting()

    def add(self, ids: Sequence[int]) -> str:
        """The text that is certain now that these tokens have come."""
        return self._not_said("".join(self._step(int(index)) for index in ids))

    def end(self) -> str:
        """The text of a character that was not completed."""
        text, self._waiting = self._text_of_waiting(), []
        return self._not_said(text)

    def _text_of_waiting(self) -> str:
        return self._difference(self._waiting) if self._waiting else ""

    def _step(self, index: int) -> str:
        self._waiting.append(index)
        text = self._difference(self._waiting)
        if text.endswith(UNKNOWN) and len(self._waiting) < LONGEST:
            return self._split(text) if len(self._waiting) >= CHARACTER else ""
        self._put_out(self._waiting, text)
        return text

    def _split(self, text: str) -> str:
        """Puts out the first waiting tokens when there are too many for one character.

        The split that leaves the fewest bytes undecoded is the right one: the bytes of a character
        decode only together, and one wrong byte spoils a whole row of byte tokens.
        """
        waiting = self._waiting

        def lost(at: int) -> int:
            parts = self._difference(waiting[:at]) + _decode(self._tokenizer, waiting[at:])
            return parts.count(UNKNOWN)

        at = min(range(1, len(waiting)), key=lost)
        if lost(at) > text.count(UNKNOWN):
            return ""
        first = self._difference(waiting[:at])
        self._put_out(waiting[:at], first)
        return first + "".join(self._step(index) for index in waiting[at:])

    def _put_out(self, ids: list[int], text: str) -> None:
        """Keeps the tokens that the next ones are decoded after; some of them have text."""
        if not text:
            ids = (self._before + ids)[: max(TAIL, len(self._before))]
        self._before, self._before_text = ids, _decode(self._tokenizer, ids)
        self._waiting = []

    def _difference(self, ids: list[int]) -> str:
        """The text of `ids` after what is out."""
        together = _decode(self._tokenizer, self._before + ids)
        begins = together.startswith(self._before_text)
        after = together[len(self._before_text) :]
        if begins and UNKNOWN not in after:
            return after
        # A wrong byte can spoil the byte tokens on both sides of the border.
        alone = _decode(self._tokenizer, ids)
        return after if begins and after.count(UNKNOWN) <= alone.count(UNKNOWN) else alone

    def _not_said(self, text: str) -> str:
        """The text without the beginning that the prompt's last tokens have said."""
        pairs = zip(text, self._said, strict=False)
        count = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
        if text:
            self._said = self._said[count:] if count == len(text) else ""
        return text[count:]


def _tail(tokenizer: Any, prompt_ids: Sequence[int]) -> list[int]:
    """The last tokens of a prompt, some of them with text where the prompt has any."""
    length = TAIL
    while True:
        tail = [int(index) for index in prompt_ids[-length:]]
        if length >= len(prompt_ids) or _decode(tokenizer, tail):
            return tail
        length *= 2


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
