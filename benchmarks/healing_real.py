"""A decoupled conversion of a real checkpoint, healed by distillation on real text.

    python -m benchmarks.healing_real MODEL TEXT OTHER [--cache 0.28125] [--steps 300]

The conversion is calibrated on the first sequences of TEXT, and trained on TEXT before its middle,
with KL to the original beside cross-entropy on all tokens (`train.finetune`). Perplexity before and
after is that of 512-token sequences which neither has read: from the middle of TEXT (the same ones
as in `benchmarks.transmla_real`) and of OTHER. An interrupted run goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import kvjax
from benchmarks.environment import environment
from benchmarks.transmla_real import batches, cpu_seconds, parser_of, sequences, sizes, token_list
from kvjax.hf.source import copy_companions
from kvjax.paths import local_path
from kvjax.runs import write_json, write_whole
from kvjax.tasks import perplexity
from kvjax.transmla import Stats, calibrate
from train.finetune.config import TuneConfig
from train.finetune.run import finetune

FITS = 64
"""Sequences of the calibration that the fits read."""


def converted(name: str, ids: Sequence[int], cache: float, sequences_: int, out: Path) -> Path:
    """The conversion as a directory that a run can load; made once."""
    if not (out / "kvjax.json").exists():
        model, params = kvjax.load(name, dtype="float32")
        stats = calibrate(model, params, batches(sequences(ids, 0, sequences_, 256), 8))
        stats = Stats(stats.layers, stats.tokens[:FITS])
        new = kvjax.transmla.convert(model, params, "decoupled", stats=stats, cache=cache)
        kvjax.save(*new, out)
        copy_companions(Path(model.config.source), out)
    return out


def write_rows(model: str, ids: Sequence[int], length: int, out: Path) -> None:
    """The text of consecutive tokens, `length` − 1 of them in a row: the end of a text is one."""
    tokenizer: Any = kvjax.load_tokenizer(model)
    pieces = [ids[i : i + length - 1] for i in range(0, len(ids), length - 1)]
    write_whole(out, "".join(json.dumps({"text": tokenizer.decode(p)}) + "\n" for p in pieces))


def main() -> None:
    parser = parser_of(__doc__, "healing_real.json")
    parser.add_argument("other", type=local_path)
    parser.add_argument("--runs", type=local_path, default=Path("healing_real_runs"))
    parser.add_argument("--cache", type=float, default=0.28125)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--length", type=int, default=512, help="tokens of a step's one sequence")
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--train", default="attention")
    args = parser.parse_args()
    ids, other = (token_list(args.model, text) for text in (args.text, args.other))
    tests = {
        text.name.partition(".")[0]: batches(sequences(own, len(own) // 2, args.test, 512), 4)
        for text, own in ((args.text, ids), (args.other, other))
    }
    rows: list[dict[str, Any]] = []

    def add(row: str, name: str, **facts: Any) -> None:
        model, params = kvjax.load(name, dtype="float32")
        found = {text: perplexity(model, params, test) for text, test in tests.items()}
        rows.append({"row": row, **facts, "perplexity": found})
        print(json.dumps(rows[-1]), flush=True)
        about = {**environment("benchmarks.healing_real"), "model": Path(args.model).name}
        write_json(args.out, {**about, "settings": settings, "rows": rows})

    args.runs.mkdir(parents=True, exist_ok=True)
    folder = converted(args.model, ids, args.cache, args.calibration, args.runs / "converted")
    write_rows(args.model, ids[: len(ids) // 2], args.length, args.runs / "rows.jsonl")
    config = TuneConfig(
        model=str(folder),
        data=(f"text:{args.runs / 'rows.jsonl'}",),
        train=(args.train,),
        teacher=args.model,
        learn="all",
        sequence_length=args.length,
        batch_size=1,
        steps=args.steps,
        learning_rate=args.rate,
        long_rows="truncate",
        dtype="float32",
        checkpoint_every=25,
        merge=True,
    )
    names = ("train", "sequence_length", "batch_size", "steps", "learning_rate", "distill")
    settings = {name: getattr(config, name) for name in names}
    start = cpu_seconds()
    report = finetune(config, args.runs / "run")
    facts = {name: report[name] for name in ("tokens", "learned_tokens", "trainable", "seconds")}
    facts["cpu_seconds_of_the_last_call"] = round(cpu_seconds() - start, 1)
    add("original", args.model)
    add("converted", str(folder), **sizes(kvjax.load(folder)[0]))
    add("healed", report["model"], **facts)


if __name__ == "__main__":
    main()
