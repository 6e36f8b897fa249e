"""Decoupled conversions of the embedded model, healed by fine-tuning their K/V factors.

    python -m benchmarks.healing [--out benchmarks/results/healing.json] [--runs healing_runs]

Each conversion is fine-tuned (`train.finetune`, kv_only) on fresh questions of the kinds that the
model was pretrained on: on the answers alone, and on all tokens with distillation from the
original. Accuracy is teacher-forced exact match of whole answers, on questions that neither
calibration nor training saw. An interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import kvjax
from benchmarks.environment import environment
from benchmarks.transmla import TASKS, embedded
from kvjax.hf import latent_rms
from kvjax.hf.source import copy_companions
from kvjax.paths import local_path
from kvjax.tasks import WordVocabulary, make_examples
from kvjax.transmla import BEST, UNBIASED, calibrate
from train.finetune.config import TuneConfig
from train.finetune.run import finetune

EXPORT = "50% rms export"
"""DeepSeek-V3's layout with its norm on the latent and no bias: what serving engines load."""

CONVERSIONS = {
    "50% best": {"kv_rank": 64, "rope_dim": 64, "recipe": BEST},
    "28% best": {"kv_rank": 24, "rope_dim": 48, "recipe": BEST},
    EXPORT: {"kv_rank": 96, "rope_dim": 32, "recipe": UNBIASED, "exportable": True},
}
ARMS = {
    "answers": {"teacher": None, "learn": "answers"},
    "all tokens + distillation": {"teacher": "builtin:needle", "learn": "all"},
}


def write_rows(path: Path, count: int, length: int) -> None:
    """Questions and answers of all tasks, of a seed that nothing else uses."""
    vocab = WordVocabulary()
    lines = []
    for task in TASKS:
        for example in make_examples(task, vocab, count, length, 3000):
            query, response = vocab.decode(example.prompt[1:]), vocab.decode(example.answer)
            lines.append(json.dumps({"query": query, "response": response}) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines))


def convert(work: Any, stats: Any, settings: dict[str, Any], out: Path) -> None:
    """The conversion as a directory that a run can load."""
    if out.exists():
        return
    model, params = kvjax.transmla.convert(
        work.model, work.params, "decoupled", stats=stats, **settings
    )
    if settings.get("exportable"):
        rms = latent_rms(model, params, [work.calibration[:8]])
        kvjax.save(model, params, out, layout="deepseek_v3", norm="rms", latent_rms=rms)
    else:
        kvjax.save(model, params, out)
    copy_companions(Path(work.model.config.source), out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=local_path, default=Path("benchmarks/results/healing.json"))
    parser.add_argument("--runs", type=local_path, default=Path("healing_runs"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--length", type=int, default=1008, help="tokens of a prompt")
    parser.add_argument("--rate", type=float, default=1e-3)
    args = parser.parse_args()
    work = embedded(Path())
    stats = calibrate(
        work.model, work.params, [work.calibration[i : i + 4] for i in range(0, 36, 4)]
    )
    write_rows(args.runs / "rows.jsonl", 80, args.length)
    rows: list[dict[str, Any]] = (
        json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    )
    done = {(row["conversion"], row["healed"]) for row in rows}

    def add(conversion: str, healed: str, model: Any, params: Any, **facts: Any) -> None:
        row = {"conversion": conversion, "healed": healed, **facts, **work.score(model, params)}
        rows.append(row)
        print(json.dumps(row), flush=True)
        head = environment("benchmarks.healing")
        settings = {"steps": args.steps, "length": args.length, "rate": args.rate, "batch_size": 2}
        args.out.write_text(json.dumps({**head, **settings, "rows": rows}, indent=1) + "\n")

    if ("none", "no") not in done:
        add("none", "no", work.model, work.params, tokens=0)
    for conversion, settings in CONVERSIONS.items():
        folder = args.runs / conversion.replace(" ", "_").replace("%", "")
        convert(work, stats, settings, folder / "converted")
        if (conversion, "no") not in done:
            add(conversion, "no", *kvjax.load(folder / "converted", dtype="float32"), tokens=0)
        for arm, choice in ARMS.items():
            if (conversion, arm) in done:
                continue
            config = TuneConfig(
                model=str(folder / "converted"),
                data=(f"plain:{args.runs / 'rows.jsonl'}",),
                sequence_length=args.length + 16,
                batch_size=2,
                steps=args.steps,
                learning_rate=args.rate,
                dtype="float32",
                merge=True,
                **choice,
            )
            report = finetune(config, folder / arm.replace(" ", "_"))
            facts = {name: report[name] for name in ("tokens", "learned_tokens", "seconds")}
            add(conversion, arm, *kvjax.load(report["model"], dtype="float32"), **facts)


if __name__ == "__main__":
    main()
