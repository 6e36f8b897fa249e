"""HumanEval and MBPP: programs that the model writes, judged in the sandbox, with pass@k.

HumanEval (Chen et al. 2021, "Evaluating Large Language Models Trained on Code") has functions to be
completed from signature and docstring. MBPP (Austin et al. 2021, "Program Synthesis with Large
Language Models") has short functions to be written from a sentence and three assertions.

Settings of both: samples of a problem (1), timeout (10 seconds), max_new_tokens (512), unsafe (0).
HumanEval also has prompt: "complete" (the default: the model continues the code) or "ask" (for
instruct models with --chat, which answer with a code block).
"""

from __future__ import annotations

import ast
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from eval.results import pass_at_k, standard_error
from eval.rows import Row, named_rows
from eval.sandbox import runner
from eval.sandbox.judge import Program
from eval.sandbox.runner import probe
from eval.task import Item, Reads, Source, Task, TaskOptions, check_options, chosen

PASS_AT = (1, 10, 100)
YES, NO = ("1", "true", "yes"), ("", "0", "false", "no")
SETTINGS = ("samples", "timeout", "max_new_tokens", "unsafe", "unsafe_execution")
SCORING = ("samples", "timeout")
METRIC = "pass@1"


HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Texts that follow a completed function's body (Chen et al., section 2.2)."""

HUMANEVAL = "humaneval/HumanEval", ("openai/openai_humaneval", "openai_humaneval")

ASK = """\
Complete this Python function. Answer with nothing but the whole function, in one code block.

```python
{code}
```"""
"""For chat models, inside their template. Asked to continue code, some write a placeholder."""


def _humaneval_reads(options: TaskOptions) -> Reads:
    """The options and settings that HumanEval reads."""
    return Reads(("data_dir", "limit"), ("prompt", *SETTINGS), SCORING)


def _humaneval(options: TaskOptions) -> Task:
    """HumanEval's 164 problems.

    Raises:
        ValueError: no data, a wrong setting, or no sandbox.
    """
    check_options("humaneval", options, _humaneval_reads(options))
    length = positive(options, "max_new_tokens", "512")
    ask = chosen(options, "prompt", ("complete", "ask")) == "ask"
    rows = named_rows(options.data_dir, *HUMANEVAL, "test")[: options.limit]
    problems = [_problem(row, ask, length) for row in rows]
    return Task(
        name="humaneval",
        items=with_samples(problems, options),
        score=judge(asked_program if ask else humaneval_program, options),
        metric=METRIC,
        stops=() if ask else HUMANEVAL_STOPS,
        truncate="left",
        chat=ask,
        raw="they are code to be completed, expected --set prompt=ask",
        summary=summary,
    )


def _problem(row: Row, ask: bool, length: int) -> Item:
    name, code = row.text("task_id"), row.text("prompt")
    return Item(
        id=name,
        # replace instead of format: code contains braces.
        prompt=ASK.replace("{code}", code.rstrip()) if ask else code,
        references=(row.text("canonical_solution"),),
        max_new_tokens=length,
        meta={"code": code, "test": row.text("test"), "entry_point": row.text("entry_point")},
    )


def asked_program(item: Item, answer: str) -> Program:
    """The code block of an answer after the problem's code, whose imports and helpers it may use.

    A whole function takes the place of the one before it; a body alone completes it.
    """
    return humaneval_program(item, fenced(answer))


def humaneval_program(item: Item, answer: str) -> Program:
    """The problem's code with its completion; the problem's tests with a call of them.

    Some tests call helpers that the prompt defines. They get the prompt's own, since an answer may
    define others of that name. The prompt alone is a program: its last function has a docstring.
    """
    test, entry_point = item.meta["test"], item.meta["entry_point"]
    return Program(
        answer=f"{item.meta['code']}{answer}\n",
        test=f"{test}\ncheck({entry_point})\n",
        given=item.meta["code"],
        names=(entry_point,),
    )


humaneval = Source(_humaneval, _humaneval_reads)


MBPP = "mbpp/mbpp", ("google-research-datasets/mbpp", "full")
TEST_IDS = range(11, 511)
SHOT_IDS = (2, 3, 4)
"""The problems of the paper's prompt (section 2.1); 11–510 are its test set."""

QUESTION = (
    "You are an expert Python programmer, and here is your task: {text} "
    "Your code should pass these tests:\n\n{tests}\n"
)
"""The prompt of the paper (section 3)."""

BEGIN, DONE = "[BEGIN]\n", "[DONE]"
MBPP_STOPS = (DONE,)


def _mbpp_reads(options: TaskOptions) -> Reads:
    """The options and settings that MBPP reads."""
    return Reads(("data_dir", "limit", "shots"), SETTINGS, SCORING)


def _mbpp(options: TaskOptions) -> Task:
    """MBPP's 500 test problems, each after `shots` examples: 0 to 3, by default 3.

    With examples the model continues the text. Without examples the prompt is the question alone,
    which suits chat models, and the answer's first code block counts.

    Raises:
        ValueError: no data, a wrong setting, or no sandbox.
    """
    check_options("mbpp", options, _mbpp_reads(options))
    length = positive(options, "max_new_tokens", "512")
    shots = len(SHOT_IDS) if options.shots is None else options.shots
    if not 0 <= shots <= len(SHOT_IDS):
        raise ValueError(f"got {shots} shots, expected 0 to {len(SHOT_IDS)}")
    # Test problems and examples are told apart by their ids, whatever the file's order.
    rows = {row.value("task_id"): row for row in _mbpp_rows(options.data_dir)}
    lacking = [number for number in SHOT_IDS[:shots] if number not in rows]
    if lacking:
        raise ValueError(f"no row with task_id {lacking[0]}, expected it for the examples")
    # The examples precede every problem; with none the prompt is the question alone.
    examples = "".join(_example(rows[number]) for number in SHOT_IDS[:shots])
    wanted = [number for number in TEST_IDS if number in rows][: options.limit]
    problems = [
        Item(
            id=f"MBPP/{number}",
            prompt=examples + _question(rows[number]) + (BEGIN if shots else ""),
            references=(_code(rows[number]),),
            max_new_tokens=length,
            meta={
                "setup": rows[number].text("test_setup_code"),
                "tests": rows[number].texts("test_list"),
            },
        )
        for number in wanted
    ]
    return Task(
        name="mbpp",
        items=with_samples(problems, options),
        score=judge(mbpp_program, options),
        metric=METRIC,
        stops=MBPP_STOPS if shots else (),
        truncate="left",
        chat=not shots,
        raw="examples are raw text, expected --shots 0",
        summary=summary,
    )


def mbpp_program(item: Item, answer: str) -> Program:
    """The answer's code; the setup, which may use that code, with the assertions.

    The tests see those names of the answer that the reference solution defines, and use the modules
    that the reference imports. An answer cannot give them another `set` or `abs`.
    """
    # A model may repeat the marks of the examples around its code.
    code = fenced(answer).partition(BEGIN)
    code = (code[2] if code[1] else code[0]).partition(DONE)[0]
    test = "\n".join((item.meta["setup"], *item.meta["tests"], ""))
    defined, imports = top_level(item.references[0])
    used = {node.id for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Name)}
    return Program(f"{code}\n", test, imports, tuple(name for name in defined if name in used))


def top_level(source: str) -> tuple[list[str], str]:
    """The functions and classes that a program defines, and its imports as a program."""
    body = ast.parse(source).body
    defined = [node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    return list(dict.fromkeys(defined)), "\n".join(map(ast.unparse, imports))


def _mbpp_rows(folder: Path | None) -> list[Row]:
    """All rows that are needed. A local file holds all splits."""
    splits = ("prompt", "test") if folder is None else ("test",)
    return [row for split in splits for row in named_rows(folder, *MBPP, split)]


def _question(row: Row) -> str:
    return QUESTION.format(text=row.text("text"), tests="\n".join(row.texts("test_list")))


def _code(row: Row) -> str:
    return row.text("code").replace("\r\n", "\n").strip()


def _example(row: Row) -> str:
    return f"{_question(row)}{BEGIN}{_code(row)}\n{DONE}\n\n"


mbpp = Source(_mbpp, _mbpp_reads)


def positive(options: TaskOptions, name: str, default: str, kind: type = int) -> Any:
    """The value of a setting that must be a number above zero.

    Raises:
        ValueError: another value.
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
    """Repeats each problem `samples` times (a setting), with ids such as "HumanEval/0#3".

    Answers to the same prompt differ only when they are sampled at a temperature above 0.
    """
    count = positive(options, "samples", "1")
    return tuple(
        dataclasses.replace(item, id=f"{item.id}#{sample}", meta={**item.meta, "problem": item.id})
        for item in problems
        for sample in range(count)
    )


def judge(program: Callable[[Item, str], Program], options: TaskOptions) -> Callable[..., float]:
    """A function that scores an answer: 1 if its tests run to their end, else 0.

    Args:
        program: (item, answer) → the answer with its tests.

    Raises:
        ValueError: the machine cannot confine a program. This call raises, so the error comes
            before the first answer.
    """
    unsafe = any(_flag(options, name) for name in ("unsafe", "unsafe_execution"))
    timeout = positive(options, "timeout", "10", float)
    # Refuse now: a whole run of answers would be lost otherwise.
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
    """pass@k over the problems, for each k up to the number of samples of every problem.

    Returns:
        {"pass@1": …, "pass@1_standard_error": …, "problems": …, "samples": of a problem,
        "sandbox": names of the layers that were on}; errors are those of a mean over problems.
    """
    problems: dict[str, list[float]] = defaultdict(list)
    for item, _, score in results:
        problems[item.meta["problem"]].append(score)
    counts = [(len(scores), sum(score == 1 for score in scores)) for scores in problems.values()]
    # pass@k needs at least k samples of every problem.
    fewest = min((samples for samples, _ in counts), default=0)
    found: dict[str, Any] = {"problems": len(counts), "samples": fewest}
    for k in PASS_AT:
        if k <= fewest:
            rates = [pass_at_k(samples, passed, k) for samples, passed in counts]
            found[f"pass@{k}"] = sum(rates) / len(rates)
            found[f"pass@{k}_standard_error"] = standard_error(rates) if len(rates) > 1 else None
    return found | {"sandbox": list(probe().available)}


def fenced(answer: str) -> str:
    """The first ``` block of an answer, or the whole answer without a block."""
    _, fence, rest = answer.partition("```")
    if not fence:
        return answer
    first, newline, code = rest.partition("\n")
    code = code if newline else first
    return code.partition("```")[0]
