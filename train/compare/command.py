"""`python -m train compare`: runs a comparison of GQA and MLA, and writes its table and curves."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np

import kvjax
from kvjax.checks import COUNT, check_ranges
from kvjax.endings import GOES_ON, only_writer, say_finished
from kvjax.extras import pyplot
from kvjax.hf import open_params, read_model
from kvjax.identity import identity
from kvjax.paths import local_path
from kvjax.runs import claim, write_json, write_picture, write_whole
from kvjax.text_files import read_object
from train.compare.config import CompareConfig, Job, final_jobs, read_compare, search_jobs
from train.compare.runs import best_rate, read_result, test_accuracies, trainer, write_data

TABLE, PICTURE = "table.md", "loss.png"
REPORT = ("results.json", TABLE, PICTURE)
"""The files of the report, which are written when all runs are finished."""


def compare(out: Path, config: Path | None = None, workers: int = 2) -> None:
    """Fine-tune GQA and the MLA conversions on the same data; write a table, curves and accuracies.

    The same command resumes an interrupted comparison.

    Args:
        out: folder for runs/, results.json, table.md and loss.png.
        config: YAML with the attributes of `CompareConfig`; default: the embedded model.
        workers: number of processes; each runs one arm at a time on one core.
    """
    check_ranges({"workers": workers}, {"workers": COUNT})
    pyplot()
    settings = read_compare(config)
    local_path(settings.model, "model")
    with only_writer(out, GOES_ON):
        check_folder(settings, out)
        if all((out / name).is_file() for name in REPORT):
            say_finished(out)
        else:
            write_data(settings, out)
            run_all(settings, out, workers)
    print((out / TABLE).read_text())


def run_all(settings: CompareConfig, out: Path, workers: int) -> None:
    """Runs everything that is not finished, and writes the report."""
    # Workers are fresh interpreters: jax must not be forked, and it reads the number of cores once.
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, _own_core, (context.Value("i", 0),)) as pool:
        # The search runs of all arms come first: they choose the rates of the reported runs.
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
    report(settings, out, accuracies)


def check_folder(config: CompareConfig, out: Path) -> None:
    """Writes the settings to config.json, or compares them with those of the runs in the folder.

    Raises:
        ValueError: the settings or the model's weights differ.
    """
    kvjax.load_tokenizer(config.model)  # the runs need it: refuse a model without one here
    model, params = read_model(config.model), open_params(config.model, "float32")
    weights = identity(model.config, params).digest
    settings = {**dataclasses.asdict(config), "weights": weights}
    holder = f"{out} holds a comparison with other settings"
    claim(out / "config.json", settings, holder, "give a new folder")


def _own_core(counter: Any) -> None:
    """Binds a worker to one core: two runs on a core each are faster than one run on both.

    Ctrl-C reaches all processes of a terminal. The main process ends the workers, which are silent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with counter.get_lock():
        index, counter.value = counter.value, counter.value + 1
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[index % len(cores)]})


def _run(config: CompareConfig, out: Path, job: Job) -> None:
    trainer(config, out, job.arm).run_once(job)


def _before(config: CompareConfig, out: Path) -> dict[str, Any]:
    """Accuracies of the model before fine-tuning; measured once and kept in before.json."""
    path = out / "before.json"
    if config.data:
        return {}
    if not path.exists():
        model, params = kvjax.load(config.model, dtype="float32")
        write_json(path, test_accuracies(config, model, params))
    return read_object(path)


def report(config: CompareConfig, out: Path, before: dict[str, Any]) -> dict[str, Any]:
    """Writes results.json, table.md and loss.png.

    Args:
        before: accuracies of the model before fine-tuning.
    """
    rows = [row for arm in config.arms for row in arm_rows(config, out, arm)]
    searches = {
        arm: {
            f"{job.rate:g}": read_result(out, job)["held_out"][-1][1]
            for job in search_jobs(config, arm)
        }
        for arm in config.arms
    }
    result = {"before": before, "searches": searches, "rows": rows}
    write_json(out / REPORT[0], result)
    write_whole(out / TABLE, table(config, result))
    plot(config, out)
    return result


def arm_rows(config: CompareConfig, out: Path, arm: str) -> list[dict[str, Any]]:
    """One row for each rate of an arm: means over the seeds, with standard errors."""
    best = best_rate(config, out, arm)
    jobs = final_jobs(config, arm, best)
    rows = []
    for rate in dict.fromkeys(job.rate for job in jobs):
        found = [read_result(out, job) for job in jobs if job.rate == rate]
        # [seeds, evaluations] held-out losses.
        curve = np.array([[loss for _, loss in run["held_out"]] for run in found])
        quarter = curve.shape[1] // 4
        rows.append(
            {
                "arm": arm,
                "rate": rate,
                "chosen": rate == best,
                "seeds": len(found),
                "trainable": found[0]["trainable"],
                "loss_quarter": mean_and_error(curve[:, quarter]),
                "loss_half": mean_and_error(curve[:, curve.shape[1] // 2]),
                "loss_end": mean_and_error(curve[:, -1]),
                "accuracy": {
                    family: mean_and_error(
                        np.array([run["accuracy"][family]["accuracy"] for run in found])
                    )
                    for family in accuracies(config)
                },
                "loss_of": {
                    name: mean_and_error(np.array([run["held_out_of"][-1][name] for run in found]))
                    for name in found[0]["held_out_of"][-1]
                },
            }
        )
    return rows


def accuracies(config: CompareConfig) -> list[str]:
    """The families whose problems are answered; none where data is given."""
    return [] if config.data else list(config.families)


def mean_and_error(values: np.ndarray) -> list[float]:
    """[mean over the seeds, standard error of the mean]; the error is 0 for one seed."""
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return [round(float(values.mean()), 4), round(float(error), 4)]


def table(config: CompareConfig, result: dict[str, Any]) -> str:
    """The results as a markdown table."""
    families, sources = accuracies(config), list(result["rows"][0]["loss_of"])
    losses = [f"of {name}" for name in sources]
    heads = ["arm", "trains", "rate", "loss at ¼", "at ½", "at the end", *losses, *families]
    lines = [" | ".join(heads), " | ".join("---" for _ in heads)]

    def cell(pair: list[float]) -> str:
        return f"{pair[0]:.3f} ± {pair[1]:.3f}"

    # The first row is the model before fine-tuning, which has accuracies only.
    before = [f"{result['before'][family]['accuracy']:.3f}" for family in families]
    if before:
        lines.append(" | ".join(["before", *[""] * (5 + len(losses)), *before]))
    for row in result["rows"]:
        lines.append(
            " | ".join(
                [
                    row["arm"],
                    f"{row['trainable']:,}",
                    f"{row['rate']:g}" + (" (chosen)" if row["chosen"] else ""),
                    *(cell(row[f"loss_{when}"]) for when in ("quarter", "half", "end")),
                    *(cell(row["loss_of"][name]) for name in sources),
                    *(cell(row["accuracy"][family]) for family in families),
                ]
            )
        )
    return "".join(f"| {line} |\n" for line in lines)


def plot(config: CompareConfig, out: Path) -> None:
    """Draws the held-out loss over the steps: mean and standard deviation over the seeds."""
    plt = pyplot()
    finals = {arm: final_jobs(config, arm, best_rate(config, out, arm)) for arm in config.arms}
    titles = ["each arm at its chosen rate"]
    if config.paper_rate is not None:
        titles.append(f"TransMLA's rate, {config.paper_rate:g}")
    size = (5.5 * len(titles), 4.2)
    figure, axes = plt.subplots(1, len(titles), figsize=size, layout="constrained", squeeze=False)
    for place, (axis, title) in enumerate(zip(axes[0], titles, strict=True)):
        for arm, jobs in finals.items():
            rate = (best_rate(config, out, arm), config.paper_rate)[place]
            label = arm if place else f"{arm}, {rate:g}"
            draw(axis, out, [job for job in jobs if job.rate == rate], label)
        axis.set(title=title, xlabel="step", yscale="log")
        axis.legend(fontsize=8)
    axes[0, 0].set_ylabel("held-out loss, nats a token")
    write_picture(out / PICTURE, figure, dpi=110)


def draw(axis: Any, out: Path, jobs: list[Job], label: str) -> None:
    """Draws the mean of one arm with a band of one standard deviation."""
    runs = [read_result(out, job)["held_out"] for job in jobs]
    steps = [step for step, _ in runs[0]]
    losses = np.array([[loss for _, loss in run] for run in runs])
    mean, spread = losses.mean(axis=0), losses.std(axis=0)
    [line] = axis.plot(steps, mean, label=label)
    axis.fill_between(steps, mean - spread, mean + spread, color=line.get_color(), alpha=0.2)
