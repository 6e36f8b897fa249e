"""GSM8K and HumanEval of Qwen2.5-Coder-1.5B-Instruct with six kinds of cache.

    python -m benchmarks.fetch_qwen_coder MODEL
    python -m benchmarks.coder_tasks run MODEL DATA TEXT --folder FOLDER [--tasks humaneval]
    python -m benchmarks.coder_tasks equal MODEL DATA TEXT --folder FOLDER [--tasks humaneval]
    python -m benchmarks.coder_tasks report

The items are a random 100 of each task, the same for all forms. Prompts stand in the chat template
(`--set prompt=ask`): asked to continue code as it is, this model writes placeholders for a third of
HumanEval's functions. Answers are greedy and computed in fp32. A decoupled conversion is calibrated
on the first 24 × 256 tokens of TEXT, in closed form. Each run is one of `python -m eval`: the same
command goes on, and each finished one is a line of RESULT.jsonl with the score of every item. The
form equal_cache is compared token by token with the original's answers, by the job `equal` (see
`benchmarks.coder_tasks_equal`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import kvjax
from benchmarks.coder_tasks_equal import Fed, best_two, compared, first_difference, leaves
from benchmarks.coder_tasks_report import EQUAL, FULL
from benchmarks.environment import environment
from benchmarks.transmla_real import batches, sequences, token_list
from eval.command import TaskCommand, adapted, execute, task_options
from eval.predictions import PREDICTIONS
from eval.prompts import encode
from eval.task import load_task
from kvjax.chat import end_ids
from kvjax.hf import read_model
from kvjax.hf.source import copy_companions
from kvjax.paths import local_path
from kvjax.runs import append_lines, whole_lines
from kvjax.text import ids_after
from kvjax.text_files import read_bytes
from kvjax.transmla import BEST, calibrate, convert

RESULT = Path("benchmarks/results/coder_tasks.json")
NUMBERS = ("full", "full:entries=int8", "full:entries=int4")
FORMS: dict[str, tuple[dict[str, Any] | None, tuple[str, ...]]] = {
    "original": (None, NUMBERS),
    "75 %": ({"method": "decoupled", "cache": 0.75}, NUMBERS[:1]),
    "50 %": ({"method": "decoupled", "cache": 0.5}, NUMBERS[:1]),
}
"""By form, its conversion and its policies, which share one reading of the prompts."""
DATA = {"humaneval": "humaneval/HumanEval", "gsm8k": "gsm8k/test"}
LONGEST = 320
"""New tokens of an answer."""
CALIBRATION = 24, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    jobs = parser.add_subparsers(dest="job", required=True)
    for name in ("run", "equal"):
        job = jobs.add_parser(name)
        job.add_argument("model")
        job.add_argument("data", type=local_path, help="folder with gsm8k/ and humaneval/")
        job.add_argument("text", type=local_path, help="what the conversions are calibrated on")
        job.add_argument("--folder", type=local_path, required=True, help="of runs and conversions")
        job.add_argument("--tasks", nargs="+", choices=list(DATA), default=list(DATA))
        job.add_argument("--items", type=int, default=100)
        job.add_argument("--batch-size", type=int, default=64)
        job.add_argument("--seed", type=int, default=0)
        job.add_argument("--out", type=local_path, default=RESULT)
        if name == "run":
            job.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    job = jobs.add_parser("report")
    job.add_argument("--out", type=local_path, default=RESULT)
    args = parser.parse_args()
    if args.job == "report":
        from benchmarks.coder_tasks_report import report

        report(args.out)
    else:
        {"run": run, "equal": equal}[args.job](args)


def run(args: argparse.Namespace) -> None:
    """Runs what RESULT.jsonl does not have yet."""
    about = environment("benchmarks.coder_tasks")  # once: the checkout may move on meanwhile
    path = args.out.with_suffix(".jsonl")
    lines = map(json.loads, whole_lines(path))
    done = {(line["task"], line["form"], line["policy"]) for line in lines}
    for task in args.tasks:
        sample(args, task)
        for form in args.forms:
            _, policies = FORMS[form]
            lacking = tuple(policy for policy in policies if (task, form, policy) not in done)
            if lacking:
                found = answered(args, task, form, lacking)
                append_lines(path, [line | about for line in found])


def sample(args: argparse.Namespace, task: str) -> None:
    """Writes the task's items to a folder of their own."""
    place = args.folder / "data" / f"{DATA[task]}.jsonl"
    rows = read_bytes(args.data / f"{DATA[task]}.jsonl.gz").decode("utf-8").splitlines()
    chosen = sorted(random.Random(args.seed).sample(range(len(rows)), args.items))
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("".join(rows[index] + "\n" for index in chosen))


def answered(
    args: argparse.Namespace, task: str, form: str, policies: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    """One line for each policy: scores and answers by item, and bytes."""
    name = form.removesuffix(" %")
    conversion, every = FORMS[form]
    # A run has its own folder: if some policies are measured already, this is another run.
    chosen = [policy.rpartition("=")[2] for policy in policies if policies != every]
    out = args.folder / "runs" / name / "_".join([task, *chosen])
    model = args.model if conversion is None else converted(args, name, conversion)
    report = execute(task, command_of(args, model, policies, out), [])
    found = [json.loads(line) for line in whole_lines(out / PREDICTIONS)]
    for row in report["policies"]:
        own = [line for line in found if line["policy"] == row["policy"]]
        yield {
            "form": form,
            "task": task,
            "policy": row["policy"],
            "scores": {line["id"]: line["score"] for line in own},
            "texts": {line["id"]: line["text"] for line in own},
            "cache_bytes": row["cache_bytes"],
            "full_cache_bytes": row["full_cache_bytes"],
        }


def command_of(
    args: argparse.Namespace, model: str, policies: tuple[str, ...] = (), out: Path | None = None
) -> TaskCommand:
    """The command of one form and task."""
    return TaskCommand(
        model=model,
        policy=policies,
        out=out,
        data_dir=args.folder / "data",
        max_new_tokens=LONGEST,
        batch_size=args.batch_size,
        chat=True,
        settings=("prompt=ask",),
        dtype="float32",
    )


def equal(args: argparse.Namespace) -> None:
    """Adds a line for each task: how the equal_cache conversion compares with the original."""
    path = args.out.with_suffix(".jsonl")
    lines = [json.loads(line) for line in whole_lines(path)]
    for task in args.tasks:
        (base,) = (x for x in lines if (x["task"], x["form"], x["policy"]) == (task, *FULL))
        if any((x["task"], x["form"]) == (task, EQUAL) for x in lines):
            continue
        items = fed(args, task, base["texts"])
        model, params = kvjax.load(converted(args, EQUAL, {"method": EQUAL}), dtype="float32")
        found = {item.name: best for item, best, _ in best_two(model, params, items)}
        # The original reads only items where the converted model leaves its answer.
        left = [item for item in items if leaves(item, found[item.name])]
        del params
        model, params = kvjax.load(args.model, dtype="float32")
        first = [
            (item.name, *first_difference(best, found[item.name], gaps))
            for item, best, gaps in best_two(model, params, left)
        ]
        line = {"form": EQUAL, "task": task, "policy": "full", **compared(items, first)}
        append_lines(path, [line | environment("benchmarks.coder_tasks")])


def fed(args: argparse.Namespace, task: str, answers: dict[str, str]) -> list[Fed]:
    """Every item's prompt with the original's answer."""
    sample(args, task)
    command, tokenizer = command_of(args, args.model), kvjax.load_tokenizer(args.model)
    config = read_model(args.model).config
    loaded = adapted(load_task(task, task_options(command, tokenizer)), command)
    ends, found = end_ids(tokenizer, config, chat=True), []
    for prompt in encode(loaded, tokenizer, config, chat=True):
        name = loaded.items[prompt.index].id
        answer = ids_after(tokenizer, answers[name])
        cut = len(answer) >= LONGEST
        found.append(Fed(name, [*prompt.ids, *answer], len(prompt.ids), () if cut else ends))
    return found


def converted(args: argparse.Namespace, name: str, conversion: dict[str, Any]) -> str:
    """Where the converted model is; it is made where it is missing."""
    folder = args.folder / "models" / name
    if not (folder / "kvjax.json").exists():
        model, params = kvjax.load(args.model, dtype="float32")
        options = dict(conversion)
        if options["method"] == "decoupled":
            rows, length = CALIBRATION
            tokens = sequences(token_list(args.model, args.text), 0, rows, length)
            saved = args.folder / "calibration"
            options["stats"] = calibrate(model, params, batches(tokens, 8), resume=saved)
            options["recipe"] = dataclasses.replace(BEST, refit=False)
        kvjax.save(*convert(model, params, **options), folder)
        copy_companions(Path(args.model), folder)
    return str(folder)


if __name__ == "__main__":
    main()
