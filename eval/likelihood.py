"""Perplexities and log-likelihoods of texts, and right answers fed under a task's policies.

`kvjax.scoring` judges the tokens: from a compressed cache all of them, the first one too.
Perplexity needs the losses of a text's tokens, lm-evaluation-harness log-likelihoods of
continuations. Protocols "teacher" and "after" of `eval.run` ask whether a right answer is the most
likely one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from eval.prompts import Prompt, Shape
from eval.task import Task
from kvjax.example import Example
from kvjax.generation import full_cache_bytes
from kvjax.nn import Transformer
from kvjax.policies.policy import Compress, Full, Policy
from kvjax.prefilling import bucket_length
from kvjax.scoring import (
    AFTER,
    INSIDE,
    Compared,
    Judged,
    Text,
    compare,
    judge_compressed,
    judge_dense,
)
from kvjax.text import ids_after

METRIC = "teacher_forced_exact_match"
NEAR = 16
"""Prompts whose lengths differ by less than this are judged together, and count as many bytes as
the longest of them."""


def dense_losses(
    model: Transformer, params: Any, rows: Int[np.ndarray, "C T"], stride: int, batch_size: int
) -> Iterator[list[np.ndarray]]:
    """Losses in nats without a cache, for each batch one array a row.

    Every token but a row's first has a loss.

    Args:
        stride: tokens from the start of a row to the start of the next one. Where rows overlap,
            the tokens that an earlier row has scored are left out.
    """
    # The first row has no earlier row, so all its losses are new.
    first = [1] + [max(1, rows.shape[1] - stride)] * (len(rows) - 1)
    texts = list(map(Text, rows.tolist(), first))
    for judged in judge_dense(model, params, texts, min(batch_size, len(rows))):
        yield [own.losses for own in judged]


def losses_after_prefix(
    model: Transformer,
    params: Any,
    rows: Int[np.ndarray, "C T"],
    prefix: int,
    policies: Sequence[Policy],
    batch_size: int,
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Losses in nats of the tokens after the first `prefix`, which are read and then compressed.

    Returns:
        For each batch, and within one for each policy, the policy's index and an array a row.

    Raises:
        ValueError: a prefix that leaves nothing to score, or a policy that bounds the growth: its
            cache would change while a piece of the continuation is read.
    """
    if not 1 <= prefix < rows.shape[1]:
        raise ValueError(f"prefix is {prefix}, expected 1 to {rows.shape[1] - 1}")
    texts = [Text(row, prefix, prefix) for row in rows.tolist()]
    chosen = dict(enumerate(policies)), min(batch_size, len(rows))
    for number, judged, _ in judge_compressed(model, params, texts, *chosen):
        yield number, [own.losses for own in judged]


@dataclass(frozen=True)
class LogLikelihoods:
    """Log-likelihoods of a batch of continuations.

    Attributes:
        log_likelihood: [B] nats, the sum over a continuation's tokens.
        greedy: [B] every token is the most likely one.
        cache_bytes, full_cache_bytes: of the whole batch, with room for the continuations; without
            a cache, what an uncompressed one would hold.
    """

    log_likelihood: Float[np.ndarray, " B"]
    greedy: Bool[np.ndarray, " B"]
    cache_bytes: int
    full_cache_bytes: int

    @classmethod
    def of(cls, judged: Sequence[Judged], held: int, full: int) -> LogLikelihoods:
        """The sums of judged continuations, with bytes of their caches."""
        sums = np.asarray([-own.losses.sum(dtype=np.float64) for own in judged])
        return cls(sums, np.asarray([own.right for own in judged]), held, full)


def score_compressed(
    model: Transformer,
    params: Any,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    policy: Policy,
) -> LogLikelihoods:
    """Log-likelihoods of continuations of different lengths after contexts that are compressed.

    The last token of each context is fed again after the compression, so the compressed cache
    predicts every token of a continuation. For many tasks the first one is the only one. Both texts
    have at least one token.
    """
    pairs, chosen = zip(contexts, continuations, strict=True), {type(policy).__name__: policy}
    texts = [Text([*a, *b], len(a), len(a), "the log-likelihoods") for a, b in pairs]
    ((_, judged, held),) = judge_compressed(model, params, texts, chosen, len(texts))
    shape = len(texts), bucket_length(max(text.read for text in texts))
    room = max(len(text.ids) - text.read for text in texts)
    return LogLikelihoods.of(judged, held, full_cache_bytes(model, params, shape, room))


def score_dense(
    model: Transformer,
    params: Any,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
) -> LogLikelihoods:
    """As `score_compressed`, in one forward pass without a cache."""
    pairs = zip(contexts, continuations, strict=True)
    texts = [Text([*a, *b], len(a), results="the log-likelihoods") for a, b in pairs]
    (judged,) = judge_dense(model, params, texts, len(texts))
    shape = len(texts), bucket_length(max(len(text.ids) for text in texts))
    full = full_cache_bytes(model, params, shape, 0)
    return LogLikelihoods.of(judged, full, full)


@dataclass(frozen=True)
class TeacherForced:
    """Right answers, to be fed through the caches of all policies after one prefill.

    Attributes:
        examples: one for each prompt, in order.
        policies: those that compress; the full cache is always compared too.
        protocol: "inside" or "after", see `kvjax.scoring.PROTOCOLS`.
    """

    examples: tuple[Example, ...]
    policies: Mapping[str, Compress]
    protocol: str

    @classmethod
    def of(
        cls,
        tokenizer: Any,
        task: Task,
        prompts: Sequence[Prompt],
        policies: Mapping[str, Policy],
        protocol: str,
    ) -> TeacherForced:
        """The prompts of a task with their answers.

        An item's meta may hold the answer's ids ("answer"), the number of tokens at the prompt's
        end that ask ("question_tokens"), and whether EOS must follow the answer ("then_eos").

        Raises:
            ValueError: an item without exactly one right answer, or policies that cannot be
                compared.
        """
        compressing = comparable(policies)
        examples = tuple(_example(tokenizer, task, prompt) for prompt in prompts)
        return cls(examples, compressing, AFTER if protocol == "after" else INSIDE)

    def batches(self, batch_size: int) -> list[list[int]]:
        """Indices of examples with contexts of nearly one length, the longest first: a lack of
        memory shows at the start."""
        groups: dict[int, list[int]] = {}
        for index, example in enumerate(self.examples):
            groups.setdefault(-(-self._compressed(example) // NEAR), []).append(index)
        return [
            members[start : start + batch_size]
            for _, members in sorted(groups.items(), reverse=True)
            for start in range(0, len(members), batch_size)
        ]

    def judge(
        self, model: Transformer, params: Any, part: Sequence[int], batch_size: int
    ) -> Compared:
        """Which of these examples each policy answers, and the bytes of its cache."""
        chosen = [self.examples[index] for index in part]
        return compare(model, params, chosen, self.policies, self.protocol, batch_size)

    def shapes(self) -> dict[Shape, int]:
        """How many prompts of each length are compressed, without room for an answer."""
        return dict(Counter(Shape(self._compressed(e), 0, 1) for e in self.examples))

    def _compressed(self, example: Example) -> int:
        """Tokens of the prompt that are compressed; the others are the question."""
        asked = example.question_length if self.protocol == AFTER else 0
        return len(example.prompt) - asked


def comparable(policies: Mapping[str, Policy]) -> dict[str, Compress]:
    """The policies that compress.

    Raises:
        ValueError: "full" with 8-bit entries, or a policy that bounds the growth: feeding an answer
            in one piece does not show the effect of such a policy.
    """
    compressing = {}
    for name, policy in policies.items():
        if isinstance(policy, Compress) and not policy.bounds_growth:
            compressing[name] = policy
        elif policy != Full():
            raise ValueError(f"policy {name!r} cannot be teacher-forced: use protocol 'generate'")
    return compressing


def _example(tokenizer: Any, task: Task, prompt: Prompt) -> Example:
    item = task.items[prompt.index]
    answer = item.meta.get("answer")
    if not answer and len(item.references) != 1:
        raise ValueError(
            f"item {item.id} has {len(item.references)} right answers, expected one: "
            "use protocol 'generate'"
        )
    answer = answer or ids_after(tokenizer, f" {item.references[0]}")
    asked, ends = item.meta.get("question_tokens", 0), item.meta.get("then_eos", True)
    return Example(prompt.ids, tuple(answer), question_length=asked, then_eos=ends)
