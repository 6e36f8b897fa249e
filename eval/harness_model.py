"""A model for lm-evaluation-harness (0.4.13): text in, log-likelihoods and text out."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
    get_rolling_token_windows,
    make_disjoint_window,
)

from eval.likelihood import LogLikelihoods, score_compressed, score_dense
from eval.run import LoadedModel
from eval.stops import ends_at_stops
from kvjax.chat import end_ids
from kvjax.generation import generate
from kvjax.policies.policy import Full, Policy, check_growth
from kvjax.progress import progress_bar
from kvjax.text import added_text, prompt_ids, until_stop

NEW_TOKENS = 256
NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names that tasks use for the length of the longest answer."""


class CompressedLM(TemplateLM):
    """Scores continuations and writes answers from caches that a policy has compressed."""

    def __init__(
        self,
        loaded: LoadedModel,
        policy: Policy,
        dense: bool = False,
        batch_size: int = 8,
        max_length: int | None = None,
        chat: bool = False,
    ):
        """
        Args:
            dense: take log-likelihoods from one forward pass without a cache.
            max_length: tokens of context and continuation, where less than the model's context.
            chat: whether the harness puts prompts inside the chat template. The end of a turn then
                ends an answer too.

        Raises:
            ValueError: a policy that changes the cache while a continuation is fed, a batch size
                below 1.
        """
        super().__init__()
        check_growth([policy], "a log-likelihood")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected ≥ 1")
        self.loaded, self.policy, self.dense = loaded, policy, dense
        self.batch_size, self.chat = batch_size, chat
        context = loaded.model.config.context_length
        self.max_length = min(context, max_length or context)
        self.tokenizer: Any = loaded.tokenizer
        self._held, self._full, self._rows = 0, 0, 0

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's EOS."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The context of a text without one: BOS, or EOS where the tokenizer has no BOS."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """The key of the harness's caches of requests."""
        return self.loaded.name.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of a text. By default exactly one BOS comes first."""
        if add_special_tokens is None:
            return prompt_ids(self.tokenizer, string)
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt of a conversation. If the model's turn is last, the answer continues it."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihoods of whole texts, in windows.

        Under a policy that compresses, half of every window except a text's first is a context,
        which is compressed. Without one the context is a single token, as in the harness's models.
        """
        # A compressing policy needs something to compress; the harness's own default is one token.
        context = 1 if self.policy == Full() else max(self.max_length // 2, 1)
        windows, owners = [], []
        for index, request in enumerate(requests):
            for pair in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=context,
            ):
                windows.append((("", ""), *make_disjoint_window(pair)))
                # A text has several windows; `owners` tells which text a window adds to.
                owners.append(index)
        totals = [0.0] * len(requests)
        for index, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[index] += value
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether greedy decoding writes it."""
        found: dict[int, tuple[float, bool]] = {}
        pairs = [self._cut(context, rest) for _, context, rest in requests]
        # Longest first: batches hold similar lengths, and a lack of memory shows at the start.
        order = sorted(range(len(pairs)), key=lambda i: [len(part) for part in pairs[i]])[::-1]
        with progress_bar() as progress:
            bar = progress.add_task("log-likelihoods", total=len(order), items="")
            for start in range(0, len(order), self.batch_size):
                members = order[start : start + self.batch_size]
                # The last batch is filled with its first row, so every batch has one shape.
                filled = members + members[:1] * (self.batch_size - len(members))
                scored = self._score([pairs[i][0] for i in filled], [pairs[i][1] for i in filled])
                for row, index in enumerate(members):
                    value = float(scored.log_likelihood[row]), bool(scored.greedy[row])
                    found[index] = value
                    if requests[index][0] != ("", ""):
                        self.cache_hook.add_partial("loglikelihood", requests[index][0], value)
                self._count(scored.cache_bytes, scored.full_cache_bytes, self.batch_size)
                progress.update(bar, advance=len(members))
        return [found[index] for index in range(len(requests))]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, cut at the first of the stops; an EOS ends them earlier."""
        found: dict[int, str] = {}
        eos = end_ids(self.tokenizer, self.loaded.model.config, self.chat)
        with progress_bar() as progress:
            bar = progress.add_task("answers", total=len(requests), items="")
            for settings, members in _grouped(requests):
                stops, new, sampling = _read(settings)
                # The prompt is cut from the left, so that the longest answer fits after it.
                room = self.max_length - new
                if room < 1:
                    raise ValueError(
                        f"a task wants {new} new tokens of {self.max_length} in all, expected "
                        "room for a prompt"
                    )
                for start in range(0, len(members), self.batch_size):
                    part = members[start : start + self.batch_size]
                    prompts = [self.tok_encode(requests[i].args[0])[-room:] for i in part]
                    ended = ends_at_stops(self.tokenizer, prompts, stops)
                    out = generate(
                        self.loaded.model,
                        self.loaded.params,
                        prompts,
                        max_new_tokens=new,
                        policy=self.policy,
                        eos_ids=eos,
                        on_tokens=functools.partial(ended, 0),
                        **sampling,
                    )
                    self._count(out.cache_bytes, out.full_cache_bytes, len(part))
                    for index, prompt, ids in zip(part, prompts, out.tokens, strict=True):
                        text = added_text(self.tokenizer, prompt, ids)
                        found[index] = until_stop(text, stops)
                        args = requests[index].args
                        self.cache_hook.add_partial("generate_until", args, found[index])
                    progress.update(bar, advance=len(part))
        return [found[index] for index in range(len(requests))]

    def bytes(self) -> dict[str, float]:
        """Mean cache bytes of a sequence over all that was read."""
        rows = max(self._rows, 1)
        return {"cache_bytes": self._held / rows, "full_cache_bytes": self._full / rows}

    def _cut(self, context: list[int], rest: list[int]) -> tuple[list[int], list[int]]:
        """Cuts a context from the left so that both fit; the last token is never read."""
        rest = rest[-self.max_length :]
        keep = self.max_length + 1 - len(rest)
        return context[-keep:], rest

    def _score(self, contexts: list[list[int]], rests: list[list[int]]) -> LogLikelihoods:
        model, params = self.loaded.model, self.loaded.params
        if self.dense:
            return score_dense(model, params, contexts, rests)
        return score_compressed(model, params, contexts, rests, self.policy)

    def _count(self, held: int, full: int, rows: int) -> None:
        self._held, self._full, self._rows = self._held + held, self._full + full, self._rows + rows


def _grouped(requests: Sequence[Any]) -> list[tuple[dict[str, Any], list[int]]]:
    """Groups requests with equal settings: the settings, and the requests' indices."""
    groups: dict[str, tuple[dict[str, Any], list[int]]] = {}
    for index, request in enumerate(requests):
        settings = request.args[1]
        groups.setdefault(repr(sorted(settings.items())), (settings, []))[1].append(index)
    return list(groups.values())


def _read(settings: dict[str, Any]) -> tuple[list[str], int, dict[str, Any]]:
    """Stops, the length of the longest answer, and the settings of sampling.

    Raises:
        ValueError: a setting that this model does not know.
    """
    rest = dict(settings)
    until = rest.pop("until", None) or []
    lengths = [value for value in (rest.pop(name, None) for name in NAMES) if value is not None]
    # Tasks may give sampling settings and switch sampling off; then they have no effect.
    sampled = rest.pop("do_sample", bool(rest.get("temperature")))
    sampling = {k: rest.pop(k) for k in ("temperature", "top_p", "top_k") if k in rest}
    if rest:
        raise ValueError(f"a task sets {', '.join(rest)} for its answers: not known here")
    if not sampled:
        sampling = {}
    elif not sampling.get("temperature"):
        sampling["temperature"] = 1.0
    stops = [until] if isinstance(until, str) else list(until)
    return [stop for stop in stops if stop], int(lengths[0] if lengths else NEW_TOKENS), sampling
