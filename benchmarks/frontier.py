"""The frontier: quality against real cache bytes, for every kind of smaller cache, on one model.

    python -m benchmarks.frontier run --book FILE --babilong FOLDER --text FILE [--quick]
    python -m benchmarks.frontier report

A form of the model is the original or a decoupled conversion of it, made once. Under each form the
policies of `POLICIES` share one reading of every prompt (`kvjax.scoring.judge_compressed`). The
prompts are those of `benchmarks.headkv_real` in the form "asked": they end where the answer's turn
begins. An answer is right if each of its tokens is the most likely one. The perplexity is that of
the tokens after a compressed prefix of the text.

Numbers are computed in fp32. Bytes are those of the arrays that a cache of bfloat16 would have,
scales and indices included, for a prompt of that length. Each finished batch is one line of
RESULT.jsonl, and the same command goes on.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

import kvjax
from benchmarks.environment import environment
from benchmarks.headkv_prompts import LENGTHS, TASKS, Source, make_prompts, without_beginning
from benchmarks.headkv_real import batches as finished_lines
from kvjax.nn import Transformer
from kvjax.paths import local_path
from kvjax.policies.importance import default_scores
from kvjax.policies.named import resolve_each
from kvjax.policies.policy import Policy
from kvjax.prefilling import prompt_bytes
from kvjax.runs import append_lines
from kvjax.scoring import Text, judge_compressed
from kvjax.text_files import read_bytes
from kvjax.transmla import calibrate, convert

RESULT = Path("benchmarks/results/frontier.json")
RATIOS = (0.02, 0.05, 0.1, 0.2, 0.4)
"""Shares of a prompt's tokens that a policy keeps."""
WITH_ENTRIES = {"int8": (0.05, 0.1, 0.2, 0.4), "int4": (0.05, 0.1, 0.15, 0.2, 0.4)}
"""The same with smaller entries. In int4, 15 % of the tokens are 5 % of the bytes."""
FEWER = (0.1, 0.4)
"""The same for converted models."""
BASELINES = ("snapkv", "adasnapkv", "spankv")
FORMS: dict[str, float | None] = {"original": None, "75 %": 0.75, "50 %": 0.5, "28 %": 0.28125}
"""By form, the share of the cache that a decoupled conversion leaves."""
NUMBERS = ("", "int8", "int4")
"""Formats of the entries; "" is the model's own."""
CALIBRATION = 32, 512
"""Sequences of the text and their tokens, for the conversions. The judged text comes after them."""
PREFIX, JUDGED = 1024, 256
"""Tokens of a text that are compressed, and of those that are judged after them."""

Line = dict[str, Any]


def policies_of(form: str) -> dict[str, str]:
    """Policy strings by label, "METHOD" or "METHOD RATIO"; + int8 marks smaller entries."""
    found = {f"full{mark(n)}": f"full:entries={n}" if n else "full" for n in NUMBERS}
    if form == "original":
        for name in ("headkv", *BASELINES):
            found |= {f"{name} {ratio}": f"{name}:ratio={ratio}" for ratio in RATIOS}
        for n, ratios in WITH_ENTRIES.items():
            found |= {f"headkv{mark(n)} {r}": f"headkv:ratio={r},entries={n}" for r in ratios}
        return found
    return found | {f"headkv {ratio}": f"headkv:ratio={ratio}" for ratio in FEWER}


def mark(entries: str) -> str:
    """The end of a label for entries of a format."""
    return f" + {entries}" if entries else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", choices=("run", "report"))
    parser.add_argument("--model", default="builtin:smollm2")
    parser.add_argument("--book", type=local_path, help="the text around the facts")
    parser.add_argument("--babilong", type=local_path, help="folder of babilong_1k.jsonl.xz …")
    parser.add_argument("--text", type=local_path, help="the text of calibration and perplexity")
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--count", type=int, default=24, help="prompts of each task")
    parser.add_argument("--texts", type=int, default=16, help="texts of the perplexity")
    parser.add_argument("--quick", action="store_true", help="3 prompts of each task, 4 texts")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--folder", type=local_path, default=Path("frontier_models"))
    parser.add_argument("--out", type=local_path, default=RESULT)
    args = parser.parse_args()
    if args.job == "report":
        from benchmarks.frontier_report import report

        report(args.out)
        return
    if args.quick:
        args.count, args.texts = 3, 4
    run(args)


def run(args: argparse.Namespace) -> None:
    """Judges the batches of every form that are not in the file of finished ones."""
    tokenizer: Any = kvjax.load_tokenizer(args.model)
    source = Source.read(tokenizer, args.book, args.babilong)
    tasks = [task for task in TASKS if task != "quote"]  # it asks nothing in this form
    examples = [e for e in make_prompts(source, args.count, args.seed) if e.name in tasks]
    asked = [as_text(*without_beginning(source, example)) for example in examples]
    text = read_bytes(args.text).decode("utf-8")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    rows, length = CALIBRATION
    calibration = np.asarray(ids[: rows * length], np.int32).reshape(rows, length)
    later = ids[len(ids) // 2 :]
    size = PREFIX + JUDGED
    texts = [
        Text(later[i * size : (i + 1) * size], PREFIX, PREFIX, "the losses of the text")
        for i in range(args.texts)
    ]
    work = {"prompts": (asked, len(tasks)), "text": (texts, 4)}
    settings = {"model": args.model, "seed": args.seed, "lengths": list(LENGTHS), "tasks": tasks}
    settings |= {"calibration": list(CALIBRATION), "prefix": PREFIX, "judged": JUDGED}
    settings |= {"policies": {form: policies_of(form) for form in FORMS}}
    path = args.out.with_suffix(".jsonl")
    done = {(line["form"], line["kind"], line["start"]) for line in finished_lines(path, settings)}
    about = environment("benchmarks.frontier")  # once: the checkout may move on meanwhile
    for form in args.forms:
        todo = [
            (kind, start, judged[start : start + step])
            for kind, (judged, step) in work.items()
            for start in range(0, len(judged), step)
            if (form, kind, start) not in done
        ]
        if todo:
            model, params = kvjax.load(form_of(args, form, calibration), dtype="float32")
            for line in lines(model, params, form, todo):
                append_lines(path, [line | about])
                print(form, line["kind"], line["start"], line["cpu_seconds"], flush=True)


def as_text(example: kvjax.Example, given: int) -> Text:
    """A question whose answer is judged after its first `given` tokens."""
    prompt = len(example.prompt)
    return Text((*example.prompt, *example.answer), prompt + given, prompt)


def form_of(args: argparse.Namespace, form: str, calibration: np.ndarray) -> str:
    """Where a form of the model is; a conversion is made where it is missing."""
    share, folder = FORMS[form], args.folder / form.removesuffix(" %")
    if share is None:
        return args.model
    if not (folder / "kvjax.json").exists():
        model, params = kvjax.load(args.model, dtype="float32")
        stats = calibrate(model, params, [calibration[i : i + 8] for i in range(0, 32, 8)])
        kvjax.save(*convert(model, params, "decoupled", stats=stats, cache=share), folder)
        scores = default_scores(model.config)
        assert scores is not None, f"{args.model} has no head_scores.json"
        shutil.copy(Path(model.config.source) / "head_scores.json", folder)
    return str(folder)


def lines(
    model: Transformer, params: Any, form: str, todo: Sequence[tuple[str, int, list[Text]]]
) -> Iterator[Line]:
    """One line for each batch: by label the nats or the right answers, and bytes of each text."""
    named = policies_of(form)
    resolved = resolve_each(list(named.values()), model.config)
    policies: dict[str, Policy] = dict(zip(named, resolved, strict=True))
    for kind, start, texts in todo:
        begin, found = time.process_time(), {}
        for label, judged, _ in judge_compressed(model, params, texts, policies, len(texts)):
            right = "".join(str(int(answer.right)) for answer in judged)
            nats = [round(float(answer.losses.mean()), 5) for answer in judged]
            found[label] = right if kind == "prompts" else nats
        read = [text.read for text in texts]
        yield {
            "form": form,
            "kind": kind,
            "start": start,
            "tokens": read,
            "judged": found,
            "bytes": {
                label: [prompt_bytes(policy, model.config, n, "bfloat16") for n in read]
                for label, policy in policies.items()
            },
            "cpu_seconds": round(time.process_time() - begin, 1),
        }


if __name__ == "__main__":
    main()
