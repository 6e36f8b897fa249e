"""`python -m train compare`: GQA against MLA, fine-tuned on the same data in the same order."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

from kvjax.checks import COUNT, check_ranges
from kvjax.paths import local_path
from train.compare.config import CompareConfig, Job, final_jobs, read_compare, search_jobs


def compare(out: Path, config: Path | None = None, workers: int = 2) -> None:
    """Fine-tunes GQA and the MLA conversions on the same data; table, curves and accuracies.

    An interrupted comparison goes on when the same command is given again.

    Args:
        out: folder for runs/, results.json, table.md and loss.png.
        config: YAML with the attributes of `CompareConfig`; default: the embedded model.
        workers: processes, each with one arm at a time on a core of its own.
    """
    check_ranges({"workers": workers}, {"workers": COUNT})
    settings = read_compare(config)
    local_path(settings.model, "model")
    check_folder(settings, out)
    from train.compare.runs import best_rate, write_data

    write_data(settings, out)
    # A fresh interpreter each: jax must not be forked, and reads its core's settings at start.
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, _own_core, (context.Value("i", 0),)) as pool:
        before = pool.apply_async(_before, (settings, out))
        searches = [job for arm in settings.arms for job in search_jobs(settings, arm)]
        pool.starmap(_run, [(settings, out, job) for job in searches], chunksize=1)
        finals = [
            job
            for arm in settings.arms
            for job in final_jobs(settings, arm, best_rate(settings, out, arm))
        ]
        pool.starmap(_run, [(settings, out, job) for job in finals], chunksize=1)
        accuracies = before.get()
    from train.compare.report import report

    report(settings, out, accuracies)
    print((out / "table.md").read_text())


def check_folder(config: CompareConfig, out: Path) -> None:
    """Writes the settings, or compares them with those of the runs that are there.

    Raises:
        ValueError: they differ, or the model's weights do.
    """
    from kvjax.hf import open_params, read_model
    from kvjax.hf.fields import read_json
    from kvjax.identity import identity

    model, params = read_model(config.model), open_params(config.model, "float32")
    weights = identity(model.config, params).digest
    path, mine = out / "config.json", json.loads(json.dumps(dataclasses.asdict(config)))
    mine["weights"] = weights
    if path.exists() and read_json(path)[1] != mine:
        raise ValueError(f"{out} holds a comparison with other settings; give a new folder")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(mine, indent=1) + "\n")


def _own_core(counter: Any) -> None:
    """Keeps a worker to one core: two runs on a core each are faster than one on both."""
    with counter.get_lock():
        index, counter.value = counter.value, counter.value + 1
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[index % len(cores)]})


def _run(config: CompareConfig, out: Path, job: Job) -> None:
    from train.compare.runs import trainer

    trainer(config, out, job.arm).run_once(job)


def _before(config: CompareConfig, out: Path) -> dict[str, Any]:
    """Accuracies of the model as it is; kept, so that they are measured once."""
    path = out / "before.json"
    if not path.exists():
        import kvjax
        from train.compare.runs import test_accuracies, whole

        model, params = kvjax.load(config.model, dtype="float32")
        whole(path, json.dumps(test_accuracies(config, model, params)) + "\n")
    return json.loads(path.read_text())
