"""Texts in, texts out: `kvjax.generate` with a tokenizer and its chat template."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvjax.context import Context
from kvjax.generation import Generation, generate
from kvjax.nn import Transformer
from kvjax.policies.policy import Policy
from kvjax.text import TextStream, chat_ids, end_ids, has_chat_template, ids_after, prompt_ids

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
            raise ValueError(f"got the texts of {len(self.texts)} prompts: read .texts")
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
            written. None: True where the tokenizer has a template and no context is given.
        system: the system's message before each prompt, where the chat template knows one.
        context: from `kvjax.compress`. Prompts continue the text of the context, without
            chat template, and the context's policy applies.
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

    >>> import kvjax
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
    wrapped = _in_chat(tokenizer, chat, system, context)
    if wrapped:
        encode = functools.partial(chat_ids, tokenizer, system=system)
    elif context is None:
        encode = functools.partial(prompt_ids, tokenizer)
    else:
        encode = functools.partial(_after_context, tokenizer)
    ids = [encode(text) for text in texts]
    # Tokens arrive one by one. A stream holds back bytes that are not a whole character yet.
    streams = [TextStream(tokenizer, each) for each in ids]
    pieces: list[list[str]] = [[] for _ in ids]

    def put_out(index: int, piece: str) -> None:
        pieces[index].append(piece)
        if on_text is not None and piece:
            on_text(index, piece)

    out = generate(
        model,
        params,
        ids,
        max_new_tokens,
        policy,
        context=context,
        on_tokens=lambda index, new: put_out(index, streams[index].add(new)),
        **{"eos_ids": end_ids(tokenizer, model.config, chat=True), **settings},
    )
    for index, stream in enumerate(streams):
        put_out(index, stream.end())
    return TextGeneration(**vars(out), texts=["".join(each) for each in pieces], prompts=ids)


def _checked(prompts: Sequence[str]) -> list[str]:
    """The prompts, each a text that is not empty."""
    for index, prompt in enumerate(prompts):
        name = "the prompt" if len(prompts) == 1 else f"prompt {index}"
        if not isinstance(prompt, str):
            kind = type(prompt).__name__
            raise ValueError(f"{name} is {kind}, expected text; kvjax.generate reads token ids")
        if not prompt:
            raise ValueError(f"{name} is empty, expected text")
    return list(prompts)


def _in_chat(
    tokenizer: Any, chat: bool | None, system: str | None, context: Context | None
) -> bool:
    """Whether prompts are put into the chat template.

    Raises:
        ValueError: the arguments contradict each other or the tokenizer.
    """
    if chat and not has_chat_template(tokenizer):
        raise ValueError("chat is True and the tokenizer has no chat template")
    if chat and context is not None:
        raise ValueError(
            "chat is True with a context, expected None or False: a prompt continues the text of "
            "the context, which began without the chat template"
        )
    wrapped = has_chat_template(tokenizer) and context is None if chat is None else chat
    if system is not None and not wrapped:
        raise ValueError("got a system message without a chat template, which would hold it")
    return wrapped


def _after_context(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text after a context, which begins with BOS already."""
    return ids_after(tokenizer, text.removeprefix(tokenizer.bos_token or ""))
