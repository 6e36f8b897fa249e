"""Texts in, texts out: `kvjax.generate` with a tokenizer and its chat template."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvjax.chat import chat_ids, end_ids, has_chat_template, turn_ids
from kvjax.context import Context
from kvjax.generation import Generation, generate
from kvjax.nn import Transformer
from kvjax.policies.policy import Policy
from kvjax.text import StoppingStream, TextStream, ids_after, prompt_ids

OnText = Callable[[int, str], None]
"""Called with a prompt's index and a piece of its new text, as soon as the piece is ready."""


@dataclass
class TextGeneration(Generation):
    """The result of `generate_text`: a `Generation` with texts.

    Attributes:
        texts: the new text of each prompt, without special tokens.
        prompts: the ids of each prompt as the model read them.
    """

    texts: list[str] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The new text of the only prompt.

        Raises:
            ValueError: there are several prompts.
        """
        if len(self.texts) != 1:
            raise ValueError(
                f"got the texts of {len(self.texts)} prompts, expected one: read .texts"
            )
        return self.texts[0]


def generate_text(
    model: Transformer,
    params: Any,
    tokenizer: Any,
    prompts: str | Sequence[str],
    max_new_tokens: int = 64,
    policy: str | Policy = "full",
    chat: bool | None = None,
    system: str | None = None,
    context: Context | None = None,
    stop: str | Sequence[str] = (),
    on_text: OnText | None = None,
    **settings: Any,
) -> TextGeneration:
    """Answers or continues every prompt.

    Where the tokenizer has a chat template, each prompt is a user's message and the new text is
    the answer. Elsewhere the new text continues the prompt.

    Args:
        tokenizer: of transformers, see `kvjax.load_tokenizer`.
        prompts: one text, or several.
        max_new_tokens: longest answer of each prompt, in tokens.
        policy: what the cache keeps of the prompts, see `kvjax.generate`.
        chat: True puts each prompt into the chat template, False continues the prompt as it is
            written. None: True where the tokenizer has a template and no context is given; with a
            context, True if the context began in the chat template.
        system: the system's message before each prompt, where the chat template knows one.
        context: from `kvjax.compress`. Prompts continue the text of the context, and the context's
            policy applies. A context in the chat template is a document in a user's message, and
            each prompt is the question that ends this message.
        stop: texts that end an answer, which is cut before them.
        on_text: called with (prompt index, piece of text) as pieces are ready. The pieces of a
            prompt are together its text, and each has whole characters.
        settings: further arguments of `kvjax.generate`: temperature, top_p, top_k, eos_ids, seed,
            batch_size, prefill_size, compile. Without eos_ids, three things end a text: the
            model's EOS, the tokenizer's EOS, and the end of a turn in the chat template.

    Returns:
        The texts, the token ids of prompts and answers, and the bytes of the caches.

    Raises:
        ValueError: a prompt that is empty or no text; a chat template that does not exist, that
            refuses the messages, or together with a context; a system message without a chat
            template; and see `kvjax.generate`.

    Examples:
        >>> model, params = kvjax.load("builtin:needle")
        >>> tokenizer = kvjax.load_tokenizer("builtin:needle")
        >>> prompt = "mary 's favorite thing is velvet . "
        >>> prompt += "the garden is grey and the woman sleeps . " * 20
        >>> prompt += "question : what is the favorite thing of mary ? answer :"
        >>> out = kvjax.generate_text(model, params, tokenizer, prompt, policy="headkv:kv_size=24")
        >>> out.text
        ' velvet'
        >>> out.cache_bytes < out.full_cache_bytes / 3
        True
    """
    texts = _checked([prompts] if isinstance(prompts, str) else prompts)
    wrapped = in_chat(tokenizer, chat, system, context)
    encode = functools.partial(_encoded, tokenizer, wrapped, system, context)
    ids = [encode(text) for text in texts]
    settings |= {"policy": policy, "context": context}
    return continue_ids(model, params, tokenizer, ids, max_new_tokens, stop, on_text, **settings)


def continue_ids(
    model: Transformer,
    params: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop: str | Sequence[str] = (),
    on_text: OnText | None = None,
    **settings: Any,
) -> TextGeneration:
    """`generate_text` for prompts that are token ids already."""
    stops = [stop] if isinstance(stop, str) else list(stop or ())
    for text in stops:
        if not isinstance(text, str) or not text:
            raise ValueError(f"stop has {text!r}, expected texts that are not empty")
    # Tokens arrive one by one. A stream holds back bytes that are not a whole character yet.
    streams = [StoppingStream(TextStream(tokenizer, each), stops) for each in prompts]
    pieces: list[list[str]] = [[] for _ in prompts]

    def put_out(index: int, piece: str) -> None:
        pieces[index].append(piece)
        if on_text is not None and piece:
            on_text(index, piece)

    def on_tokens(index: int, new: list[int]) -> bool:
        put_out(index, streams[index].add(new))
        return streams[index].stopped

    defaults = {"eos_ids": end_ids(tokenizer, model.config, chat=True), "on_tokens": on_tokens}
    out = generate(model, params, prompts, max_new_tokens, **{**defaults, **settings})
    for index, stream in enumerate(streams):
        put_out(index, stream.end())
    return TextGeneration(**vars(out), texts=["".join(each) for each in pieces], prompts=prompts)


def _checked(prompts: Sequence[str]) -> list[str]:
    """The prompts, each a text that is not empty."""
    if not isinstance(prompts, Sequence):
        raise ValueError(f"prompts is {type(prompts).__name__}, expected one text or several")
    for index, prompt in enumerate(prompts):
        name = "the prompt" if len(prompts) == 1 else f"prompt {index}"
        if not isinstance(prompt, str):
            kind = type(prompt).__name__
            raise ValueError(f"{name} is {kind}, expected text: kvjax.generate reads token ids")
        if not prompt:
            raise ValueError(f"{name} is empty, expected text")
    return list(prompts)


def in_chat(
    tokenizer: Any, chat: bool | None, system: str | None, context: Context | None = None
) -> bool:
    """Whether prompts, or a text to compress, are put into the chat template.

    Raises:
        ValueError: the arguments contradict each other or the tokenizer.
    """
    if chat and not has_chat_template(tokenizer):
        raise ValueError("chat is True and the tokenizer has no chat template, expected chat=False")
    if chat and context is not None and not context.chat:
        raise ValueError(
            "chat is True with a context that began without the chat template, expected None or "
            "False: a prompt continues the text of the context"
        )
    if system is not None and context is not None:
        raise ValueError(
            "got a system message with a context, expected it in kvjax compress --system"
        )
    default = has_chat_template(tokenizer) if context is None else context.chat
    wrapped = default if chat is None else chat
    if system is not None and not wrapped:
        raise ValueError("got a system message and no chat template to hold it, expected none")
    return wrapped


def _encoded(
    tokenizer: Any, wrapped: bool, system: str | None, context: Context | None, text: str
) -> list[int]:
    """The ids of one prompt."""
    if context is None:
        return chat_ids(tokenizer, text, system) if wrapped else prompt_ids(tokenizer, text)
    if wrapped:
        message, opening = turn_ids(tokenizer, text, document=True)
        return message + opening
    # A context begins with BOS already.
    return ids_after(tokenizer, text.removeprefix(tokenizer.bos_token or ""))
