"""The command line `python -m train`: pretrain, fine-tune, compare, make data, export, plot."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from kvjax import compilation_cache, processes
from kvjax.endings import GOES_ON, endings, only_writer
from kvjax.paths import check_local, local_arguments, take_flag
from kvjax.runs import write_json
from kvjax.usage import check_command, parsed
from train.compare.command import compare
from train.compare.runs import write_rows
from train.finetune.config import TuneConfig, read_config
from train.finetune.dry_run import dry_run
from train.finetune.run import finetune
from train.pretrain.curriculum import read_curriculum
from train.pretrain.results import evaluate, export, plot_curve
from train.pretrain.run import pretrain


def pretrain_command(config: Path, out: Path, max_steps: int | None = None) -> None:
    """Pretrain on a curriculum; resumes where a run in the same folder stopped.

    Args:
        config: YAML curriculum, e.g. train/pretrain/needle.yaml.
        out: folder for checkpoints and metrics.jsonl.
        max_steps: stop after this many steps.
    """
    with only_writer(out, GOES_ON):
        pretrain(read_curriculum(config), out, max_steps)


def export_command(config: Path, run: Path, out: Path, dtype: str = "bfloat16") -> None:
    """Write the newest checkpoint of a pretraining run in Hugging Face's layout.

    Args:
        config: YAML file of the run's curriculum.
        run: the run's folder.
        out: folder for the model and its tokenizer.
        dtype: of the written weights.
    """
    export(read_curriculum(config), run, out, dtype)


def evaluate_command(
    model: str,
    out: Path | None = None,
    tasks: tuple[str, ...] = ("needle", "multi_key", "two_hop", "two_hop_crowded"),
    lengths: tuple[int, ...] = (256, 512, 1024),
    count: int = 200,
    dtype: str | None = None,
) -> None:
    """Measure accuracy on unseen prompts, with the full cache.

    Args:
        model: a directory, or builtin:needle.
        out: JSON file for the result.
        tasks: names of kvjax.tasks.recall.
        lengths: tokens of the prompts.
        count: prompts for each task and length.
        dtype: of the parameters; None: float32 on CPUs, bfloat16 elsewhere.
    """
    evaluate(model, out, tasks, lengths, count, dtype)


def curve_command(config: Path, metrics: Path, out: Path) -> None:
    """Draw the log of a pretraining run.

    Args:
        config: YAML file of the run's curriculum.
        metrics: the run's metrics.jsonl.
        out: PNG file.
    """
    plot_curve(read_curriculum(config), metrics, out)


def family_command(
    name: str, out: Path, count: int = 5000, seed: int = 0, split: str = "train"
) -> None:
    """Write problems for fine-tuning: JSON lines with "query" and "response".

    Args:
        name: word_problems or programs.
        out: the file.
        count: number of problems.
        seed: other seeds give other problems.
        split: train or test; no query is in both.
    """
    write_rows(out, name, count, seed, split)


@dataclass(frozen=True)
class Arguments:
    """Fine-tune a model; resumes where a run in the same folder stopped.

    Attributes:
        settings: of the run.
        out: folder of the run; not needed with --dry-run.
        config: YAML file with settings; flags override it.
        stop_after: stop after this many steps in all.
        dry_run: compile the step, print memory and FLOPs of each device, and stop.
        topology: for --dry-run: a TPU topology such as v5e:8x8 or v5p:2x2x4 (needs libtpu).
        distributed: for several processes: "auto" on TPU pods, Slurm and Open MPI, or
            HOST:PORT,PROCESSES,INDEX with the address of the first process. Default: the
            environment variable KVJAX_DISTRIBUTED, if it is set.
        json: also write the result to this file.
    """

    settings: Annotated[TuneConfig, tyro.conf.arg(name="")]
    out: Path | None = None
    config: Path | None = None
    stop_after: int | None = None
    dry_run: bool = False
    topology: str | None = None
    distributed: str | None = None
    json: Path | None = None


def parse(argv: Sequence[str]) -> Arguments:
    """Arguments from flags, which override the settings of the file --config.

    Raises:
        ValueError: a bad setting in the file.
    """
    # Read the file first: its settings become the defaults of the flags.
    config, _ = take_flag(list(argv), "--config", "a YAML file")
    default = None if config is None else Arguments(read_config(Path(config)))
    prog = "python -m train finetune"
    given = {} if default is None else {"default": default}
    return parsed(Arguments, prog, argv, **given)


def tune(arguments: Annotated[Arguments, tyro.conf.arg(name="")]) -> None:
    """Fine-tune a model; resumes where a run in the same folder stopped.

    Raises:
        ValueError: see `train.finetune.run.finetune`.
    """
    check_local(arguments)
    processes.join(arguments.distributed)
    if arguments.dry_run:
        if arguments.topology is not None:  # the cache cannot read programs of other devices
            compilation_cache.enable("off")
        report = dry_run(arguments.settings, arguments.topology)
    else:
        if arguments.out is None:
            raise ValueError("got no --out, expected a folder for the run")
        with only_writer(arguments.out, GOES_ON):
            report = finetune(arguments.settings, arguments.out, arguments.stop_after)
    # One of several processes reports.
    if not processes.is_writer():
        return
    if arguments.json is not None:
        write_json(arguments.json, report)
    print_report(report)


def print_report(report: dict[str, Any]) -> None:
    """Prints a table with one row for each value."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "", show_header=False)
    for key, value in report.items():
        table.add_row(key, f"{value:,}" if isinstance(value, int) else str(value))
    Console().print(table)


COMMANDS = {
    "pretrain": pretrain_command,
    "export": export_command,
    "evaluate": evaluate_command,
    "curve": curve_command,
    "finetune": tune,
    "compare": compare,
    "family": family_command,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command; see `kvjax.endings` for bad input and signals."""
    argv = list(sys.argv[1:] if argv is None else argv)
    with endings("train"):
        folder, argv = compilation_cache.take_flag(argv)
        check_command(argv, COMMANDS)
        if argv[:1] == ["finetune"]:
            # Parsed separately: flags override the file that one of them names.
            arguments = parse(argv[1:])
            compilation_cache.enable(folder, processes.asked(arguments.distributed))
            with processes.together():
                tune(arguments)
        else:
            compilation_cache.enable(folder)
            commands = {name: local_arguments(command) for name, command in COMMANDS.items()}
            parsed(commands, "python -m train", argv, description=compilation_cache.HELP)


if __name__ == "__main__":
    main()
