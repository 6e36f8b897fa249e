"""Text and token ids: the ids of a prompt, the text of an answer, and the score of an answer.

Sentencepiece's decoder drops a space before its first token. So new tokens are decoded together
with the tokens before them, and the text of the earlier tokens is cut off."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

ANCHORS = ("\n", "a", ".", "☺")
"""Texts to encode before another text; a tokenizer rarely merges all of them with that text."""

ANCHOR = 64
"""Characters of a known text before another text that are encoded with it. More would not change
the ids, and the texts before an answer are long."""


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text that begins a sequence and will be continued.

    The special tokens that the tokenizer puts before a text (BOS) come once: a text that begins
    with them gets no second ones. Tokens that the tokenizer puts after a text (EOS) are left out.

    Args:
        tokenizer: of transformers.
    """
    ids, start = encode(tokenizer, text), _start(tokenizer)
    return ids if ids[: len(start)] == start else start + ids


def ids_after(tokenizer: Any, text: str, before: str = "") -> list[int]:
    """Ids of a text that follows another one, without the tokenizer's special tokens.

    Sentencepiece tokenizers put a space before any text that they encode. Here this would be a
    space that the text does not have, so the text is encoded together with one before it.

    Args:
        tokenizer: of transformers.
        before: the text before this one; "" if unknown.
    """
    alone, before = encode(tokenizer, text), before[-ANCHOR:]
    for anchor in filter(None, (before, *ANCHORS)):
        head = encode(tokenizer, anchor)
        written = _written(tokenizer, head, alone)
        if written == text:
            return alone
        whole = encode(tokenizer, anchor + text)
        rest = whole[len(head) :]
        # A made-up text before this one is used only if the space is the only difference.
        saves = anchor == before or f" {_written(tokenizer, head, rest)}" == written
        if rest and whole == head + rest and saves:
            return rest
    return alone


def _start(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer puts before a text."""
    plain, whole = encode(tokenizer, "a"), list(tokenizer.encode("a"))
    if not plain:
        # No token for "a", so nothing separates what comes before from what comes after.
        return [index for index in whole[:1] if index == tokenizer.bos_token_id]
    places = range(len(whole) - len(plain) + 1)
    return next((whole[:at] for at in places if whole[at : at + len(plain)] == plain), [])


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text alone, without the tokenizer's special tokens.

    Raises:
        ValueError: the tokenizer is none, but its path, for example.
    """
    if not hasattr(tokenizer, "encode") or isinstance(tokenizer, str):
        kind = type(tokenizer).__name__
        raise ValueError(f"tokenizer is {kind}, expected what kvjax.load_tokenizer(PATH) returns")
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False)) if text else []


def _written(tokenizer: Any, head: list[int], ids: list[int]) -> str:
    """The text that `ids` add after `head`, special tokens written out."""
    before, text = (
        tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in (head, head + ids)
    )
    return text[len(before) :]


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
        # A prompt can end within a character. If the answer completes it, it belongs to the answer.
        self._said = self._text_of_waiting()

    def add(self, ids: Sequence[int]) -> str:
        """Takes new tokens, and returns the new text that later tokens cannot change."""
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


def until_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stops."""
    ends = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))]


class StoppingStream:
    """A `TextStream` that ends before one of some texts, the first that is complete.

    Attributes:
        stopped: whether one of the texts came.
    """

    def __init__(self, stream: TextStream, stops: Sequence[str]):
        self._stream, self._stops = stream, stops
        self._held = ""  # text that a stop may begin with
        self.stopped = False

    def add(self, ids: Sequence[int]) -> str:
        """Takes new tokens, and returns the new text that no later tokens can cut off."""
        text = self._held + self._stream.add(ids)
        if any(stop in text for stop in self._stops):
            self.stopped, self._held = True, ""
            return until_stop(text, self._stops)
        held = max((_begun(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def end(self) -> str:
        """The rest of the text, unless a stop ended it."""
        if self.stopped:
            return ""
        return until_stop(self._held + self._stream.end(), self._stops)


def _begun(text: str, stop: str) -> int:
    """Characters at the end of a text that the stop begins with."""
    sizes = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((size for size in sizes if stop.startswith(text[-size:])), 0)


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


def exact_match(prediction: Sequence[int], answer: Sequence[int]) -> float:
    """1.0 if the prediction has exactly the tokens of the answer, in the same order; else 0.0."""
    return float(list(prediction) == list(answer))


def token_f1(prediction: Sequence[int], answer: Sequence[int]) -> float:
    """Harmonic mean of precision and recall of the tokens, order ignored (SQuAD's F1)."""
    common = _common(prediction, answer)
    if common == 0:
        return 0.0
    precision, recall = common / len(prediction), common / len(answer)
    return 2 * precision * recall / (precision + recall)


def rouge1_recall(prediction: Sequence[int], answer: Sequence[int]) -> float:
    """Share of the answer's tokens that are in the prediction, order ignored."""
    return _common(prediction, answer) / len(answer) if answer else 0.0


def _common(prediction, answer) -> int:
    return sum((Counter(prediction) & Counter(answer)).values())
