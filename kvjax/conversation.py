"""A chat of many turns over one compressed cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvjax.chat import Turn, turn_ids
from kvjax.context import Context, compress, extend_context
from kvjax.nn import Transformer
from kvjax.policies.named import parse_policy
from kvjax.policies.policy import Full, Policy
from kvjax.text_generation import OnText, TextGeneration, continue_ids

AGAIN = 1024
"""Tokens that turns may add in full before the whole chat is read and compressed again."""


@dataclass(frozen=True)
class Conversation:
    """A chat so far. It does not change: every message makes a new one.

    Attributes:
        context: the compressed cache of the text up to the end of the last message; None before
            the first one.
        rest: ids after the text of the context: the last answer, and the end of the turn before it.
        answered: number of answered messages.
        ids: ids of the text of the context. None if they are unknown, as those of a context that
            was loaded: then the text is never compressed again.
        compressed: tokens that the policy has chosen from; the later ones are kept in full.
    """

    context: Context | None = None
    rest: tuple[int, ...] = ()
    answered: int = 0
    ids: tuple[int, ...] | None = ()
    compressed: int = 0

    @classmethod
    def after(cls, context: Context) -> Conversation:
        """A chat about the document of a context.

        Raises:
            ValueError: the context began without the chat template.
        """
        if not context.chat:
            raise ValueError(
                "the context began without the chat template, expected one that `kvjax compress` "
                "wrote for a model with a chat template, without --raw"
            )
        return cls(context, ids=None, compressed=context.length)


def ask(
    model: Transformer,
    params: Any,
    tokenizer: Any,
    conversation: Conversation,
    message: str,
    policy: str | Policy = "full",
    system: str | None = None,
    max_new_tokens: int = 256,
    stop: str | Sequence[str] = (),
    on_text: OnText | None = None,
    **settings: Any,
) -> tuple[Conversation, TextGeneration]:
    """Answers the next message of a chat.

    The policy compresses the text up to the end of the first message. Later turns are kept in full,
    and when they have more than AGAIN tokens, the whole chat is read again and compressed, unless
    the policy keeps every token.

    Args:
        tokenizer: of transformers, with a chat template.
        policy: what the cache keeps of the chat, see `kvjax.compress`.
        system: the system's message before the first one; the same in every turn.
        max_new_tokens, stop, on_text, settings: see `kvjax.generate_text`.

    Returns:
        The chat with the message and its answer, and the answer.

    Raises:
        ValueError: an empty message, a chat template that refuses the messages, a chat that is
            longer than the model's context, and see `kvjax.compress`.
    """
    if not message:
        raise ValueError("the message is empty, expected text")
    document = conversation.context is not None and conversation.ids is None
    turn = turn_ids(tokenizer, message, conversation.answered, document, system)
    read = _read(model, params, conversation, turn, policy)
    out = continue_ids(
        model,
        params,
        tokenizer,
        [turn.opening],
        max_new_tokens,
        stop,
        on_text,
        context=read.context,
        **settings,
    )
    rest = (*turn.opening, *out.tokens[0])
    return dataclasses.replace(read, rest=rest, answered=conversation.answered + 1), out


def _read(
    model: Transformer, params: Any, conversation: Conversation, turn: Turn, policy: str | Policy
) -> Conversation:
    """The chat with the next message in its context."""
    new = (*conversation.rest, *turn.message)
    ids = None if conversation.ids is None else (*conversation.ids, *new)
    if conversation.context is not None:
        held = conversation.context.length + len(new) - conversation.compressed
        # To read the chat again is of use only to a policy that drops tokens.
        if ids is None or held <= AGAIN or isinstance(parse_policy(policy), Full):
            context = extend_context(model, params, conversation.context, new)
            return dataclasses.replace(conversation, context=context, ids=ids)
    assert ids is not None
    context = compress(model, params, ids, policy, chat=True)
    return dataclasses.replace(conversation, context=context, ids=ids, compressed=len(ids))
