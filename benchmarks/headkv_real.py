"""Budgets of heads on a real model: policies compared on the same prompts of six tasks.

    python -m benchmarks.headkv_real run --book FILE --babilong FOLDER [--need FILE]
    python -m benchmarks.headkv_real prompts --book FILE --babilong FOLDER --prompts-out FILE.jsonl
    python -m benchmarks.headkv_real report

With `--form asked` a prompt ends where the answer's turn begins, as in a chat; the beginning of the
answer is fed after the compression. The form "begun" has it at the end of the prompt.

Each prompt is read once for all policies (`benchmarks.hidden`). An answer counts if each of its
tokens is the most likely one where it sees only the tokens that a policy keeps. A batch has one
prompt of each task, and each finished batch is one line of RESULT.jsonl; the same command
continues. `report` makes the result file and a table with paired differences. The spans of headkv
were chosen on prompts of CHOSEN_ON, and its queries and their fade on all kinds, with other
numbers, texts and seeds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

import kvjax
from benchmarks.environment import environment
from benchmarks.headkv_prompts import (
    LENGTHS,
    TASKS,
    Source,
    make_prompts,
    without_beginning,
    write_prompts,
)
from benchmarks.hidden import right_answers
from kvjax import policies
from kvjax.paths import local_path
from kvjax.policies.budgets import (
    HeadImportance,
    Request,
    group_importance,
    growing_beta,
    head_caps,
    normalise,
)
from kvjax.policies.importance import HeadScores, default_scores
from kvjax.policies.named import resolve_each
from kvjax.policies.need import MeasuredNeed, load_need
from kvjax.policies.policy import Compress
from kvjax.policies.scorers import LayerView, SpanWindow, by_kv_head, window_attention
from kvjax.runs import append_lines, check_same, cut_torn_line, whole_lines
from kvjax.scoring import FULL

CHOSEN_ON = ("number", "quote")
KV_SIZES = (16, 24, 48, 96, 192)
STEPS = {"begun": (8, 40), "asked": (28, 60)}
"""By form, tokens to which short and long answers are padded."""
BASELINE = "snapkv"
RESULT = Path("benchmarks/results/headkv_real.json")


Asked = tuple[kvjax.Example, int]
"""A question, and the number of first tokens of its answer that are not judged."""


@dataclass(frozen=True)
class FixedSpan:
    """The earlier choice of tokens: a span of fixed length around an attended token."""

    ahead: int
    behind: int = 3
    falloff: float = 0.01

    def __call__(self, view: LayerView) -> Float[jax.Array, "B K S"]:
        scores_BKS = by_kv_head(window_attention(view), view.keys.shape[1])
        scores_BKS = jnp.where(view.candidates, scores_BKS, 0.0)
        S, best = scores_BKS.shape[2], scores_BKS
        sides = [(by, by) for by in range(1, self.ahead + 1)]
        sides += [(-by, self.ahead + by) for by in range(1, self.behind + 1)]
        for by, distance in sides:
            padded = jnp.pad(scores_BKS, ((0, 0), (0, 0), (max(by, 0), max(-by, 0))))
            moved = padded[..., max(-by, 0) :][..., :S]
            best = jnp.maximum(best, moved * (1 - self.falloff * distance))
        return best


@dataclass(frozen=True)
class Softer:
    """Budgets from a power of the importance, with a floor that grows twice as fast."""

    scores: HeadScores
    power: float = 0.7

    def __call__(self, request: Request) -> np.ndarray:
        values = group_importance(self.scores.mean, request.num_kv_heads) ** self.power
        beta = growing_beta(2 * request.budget)
        return head_caps(normalise(values), request.budget, beta, request.limits)


def asked_policies(need: str, scores: HeadScores) -> dict[str, Any]:
    """Functions from a KV size to a policy, by name.

    Args:
        need: a file of need curves; "" for none.
        scores: the model's head scores.
    """
    softer = Softer(scores)
    found = {
        "headkv": policies.headkv,
        "headkv, softer": lambda kv_size: Compress(softer, SpanWindow(), kv_size),
        "headkv, ahead=3": lambda kv_size: fixed(3, kv_size),
        "headkv, queries=8": lambda kv_size: policies.headkv(kv_size=kv_size, queries=8, fade=0.75),
        "headkv_paper": policies.headkv_paper,
        "snapkv": policies.snapkv,
        "adasnapkv": policies.adasnapkv,
        "pyramidkv": policies.pyramidkv,
        "streaming": policies.streaming,
    }
    if need:
        curves = MeasuredNeed(load_need(need))
        found["headkv, need"] = lambda kv_size: Compress(curves, SpanWindow(), kv_size)
        found["headkv, both"] = lambda kv_size: policies.headkv(kv_size=kv_size, need=need)
    return found


def fixed(ahead: int, kv_size: int) -> Compress:
    """headkv with the earlier choice of tokens."""
    return Compress(HeadImportance(), FixedSpan(ahead), kv_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", choices=("run", "prompts", "report"))
    parser.add_argument("--model", default="builtin:smollm2")
    parser.add_argument("--book", type=local_path, help="a text file, also packed")
    parser.add_argument("--babilong", type=local_path, help="folder of babilong_1k.jsonl.xz …")
    parser.add_argument("--need", default="", help="need curves for one more policy")
    parser.add_argument("--form", choices=tuple(STEPS), default="begun")
    parser.add_argument("--policies", default="", help="only these, separated by semicolons")
    parser.add_argument("--sizes", type=int, nargs="+", default=KV_SIZES, help="KV sizes")
    parser.add_argument("--count", type=int, default=36, help="prompts of each task")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=local_path, default=RESULT)
    parser.add_argument("--prompts-out", type=local_path, default=Path("prompts.jsonl"))
    args = parser.parse_args()
    if args.job == "report":
        from benchmarks.headkv_real_report import report

        report(args.out, CHOSEN_ON, BASELINE)
        return
    source = Source.read(kvjax.load_tokenizer(args.model), args.book, args.babilong)
    examples = make_prompts(source, args.count, args.seed)
    if args.job == "prompts":
        write_prompts(examples, args.prompts_out)
    elif args.form == "begun":
        run(args, TASKS, [(example, 0) for example in examples])
    else:
        # A quotation begins in the answer's turn: without it the prompt asks nothing.
        tasks = [task for task in TASKS if task != "quote"]
        run(args, tasks, [without_beginning(source, e) for e in examples if e.name in tasks])


def run(args: argparse.Namespace, tasks: Iterable[str], asked: Sequence[Asked]) -> None:
    """Judges the batches that are not in the file of finished ones."""
    tasks = list(tasks)
    model, params = kvjax.load(args.model, dtype="float32")
    scores = default_scores(model.config)
    assert scores is not None, f"{args.model} has no head_scores.json: make one with kvjax score"
    makers = asked_policies(args.need, scores)
    if args.policies:
        makers = {name: makers[name] for name in map(str.strip, args.policies.split(";"))}
    names = [(name, size) for size in args.sizes for name in makers]
    resolved = resolve_each([makers[name](kv_size=size) for name, size in names], model.config)
    every: dict[str, Any] = {
        f"{name} {size}": policy for (name, size), policy in zip(names, resolved, strict=True)
    }
    settings = {"model": Path(args.model).name, "seed": args.seed, "lengths": list(LENGTHS)}
    settings |= {"tasks": tasks, "kv_sizes": list(args.sizes), "policies": [FULL, *makers]}
    settings["form"] = args.form
    path = args.out.with_suffix(".jsonl")
    finished = batches(path, settings)
    # Once: the checkout may move on while the run goes on.
    about = environment("benchmarks.headkv_real")
    for start in range(len(finished) * len(tasks), len(asked), len(tasks)):
        begin = time.process_time()
        batch = asked[start : start + len(tasks)]
        right = judged(model, params, batch, every, STEPS[args.form])
        line: dict[str, Any] = {"right": right, "lengths": [len(e.prompt) for e, _ in batch]}
        line["cpu_seconds"] = round(time.process_time() - begin, 1)
        append_lines(path, [line | about])
        print(start, right[FULL], line["cpu_seconds"], flush=True)


def judged(
    model: Any,
    params: Any,
    batch: Sequence[Asked],
    every: dict[str, Compress],
    sizes: tuple[int, int],
) -> dict[str, str]:
    """By policy, which answers were right: "1" and "0" in the order of the batch.

    Long answers are judged apart, so that short ones are not padded to their length.
    """
    found = {name: ["0"] * len(batch) for name in (FULL, *every)}
    short, long = sizes
    for steps, above in ((short, 0), (long, short)):
        places = [i for i, (e, _) in enumerate(batch) if above < len(e.answer) <= steps]
        part, given = [batch[i][0] for i in places], [batch[i][1] for i in places]
        for name, right in right_answers(model, params, part, every, steps, given).items():
            for place, is_right in zip(places, right, strict=True):
                found[name][place] = str(int(is_right))
    return {name: "".join(bits) for name, bits in found.items()}


def batches(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The finished batches; the first line of their file has the settings.

    Raises:
        ValueError: the file belongs to other settings.
    """
    cut_torn_line(path)
    lines = [json.loads(line) for line in whole_lines(path)]
    if not lines:
        append_lines(path, [settings])
        return []
    held = f"{path} holds a run with other settings"
    check_same(lines[0], settings, held, "repeat its command, or remove it")
    return lines[1:]


if __name__ == "__main__":
    main()
