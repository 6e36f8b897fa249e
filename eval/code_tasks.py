"""What HumanEval and MBPP share: samples of a problem, judgement in the sandbox, pass@k."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from eval.sandbox import runner
from eval.sandbox.layers import probe
from eval.statistics import pass_at_k, standard_error
from eval.task import Item, TaskOptions

PASS_AT = (1, 10, 100)
YES, NO = ("1", "true", "yes"), ("", "0", "false", "no")
SETTINGS = ("samples", "timeout", "max_new_tokens", "unsafe", "unsafe_execution")
SCORING = ("samples", "timeout")
METRIC = "pass@1"


def positive(options: TaskOptions, name: str, default: str, kind: type = int) -> Any:
    """A setting that is a number above zero.

    Raises:
        ValueError: it is not.
    """
    text = options.settings.get(name, default)
    try:
        value = kind(text)
    except ValueError:
        value = 0
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}={text}, expected a number above 0")
    return value


def with_samples(problems: Iterable[Item], options: TaskOptions) -> tuple[Item, ...]:
    """Each problem as often as the setting `samples` says (1), with ids like "HumanEval/0#3".

    Answers to the same prompt differ only when they are sampled at a temperature above 0.
    """
    count = positive(options, "samples", "1")
    return tuple(
        dataclasses.replace(item, id=f"{item.id}#{sample}", meta={**item.meta, "problem": item.id})
        for item in problems
        for sample in range(count)
    )


def judge(program: Callable[[Item, str], str], options: TaskOptions) -> Callable[..., float]:
    """Score of an answer: 1 if its program runs to its end.

    Settings: timeout (10 seconds), unsafe or unsafe_execution (run without a sandbox's layers).

    Raises:
        ValueError: now, not at the first answer, if nothing here can confine a program.
    """
    unsafe = any(_flag(options, name) for name in ("unsafe", "unsafe_execution"))
    timeout = positive(options, "timeout", "10", float)
    runner.require(probe(), unsafe)

    def score(item: Item, answer: str) -> float:
        return float(runner.run(program(item, answer), timeout=timeout, unsafe=unsafe).passed)

    return score


def _flag(options: TaskOptions, name: str) -> bool:
    text = options.settings.get(name, "").lower()
    if text not in (*YES, *NO):
        raise ValueError(f"{name}={text}, expected 1 or 0")
    return text in YES


def summary(results: list[tuple[Item, str, float]]) -> dict[str, Any]:
    """pass@k over the problems, for each k that every one of them has samples for.

    Returns:
        {"pass@1": …, "pass@1_standard_error": …, "problems": …, "samples": of a problem,
        "sandbox": layers that were on}; the error is that of a mean over problems.
    """
    problems: dict[str, list[float]] = defaultdict(list)
    for item, _, score in results:
        problems[item.meta["problem"]].append(score)
    counts = [(len(scores), sum(score == 1 for score in scores)) for scores in problems.values()]
    fewest = min((samples for samples, _ in counts), default=0)
    found: dict[str, Any] = {"problems": len(counts), "samples": fewest}
    for k in PASS_AT:
        if k <= fewest:
            rates = [pass_at_k(samples, passed, k) for samples, passed in counts]
            found[f"pass@{k}"] = sum(rates) / len(rates)
            found[f"pass@{k}_standard_error"] = standard_error(rates) if len(rates) > 1 else None
    return found | {"sandbox": list(probe().available)}


def fenced(answer: str) -> str:
    """The first ``` block of an answer, or all of it where there is none."""
    _, fence, rest = answer.partition("```")
    if not fence:
        return answer
    first, newline, code = rest.partition("\n")
    code = code if newline else first
    return code.partition("```")[0]
