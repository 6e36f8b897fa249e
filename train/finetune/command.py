"""`python -m train finetune`: settings from a YAML file, from flags, or both."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import absl.logging
import tyro

from kvjax import compilation_cache, processes
from kvjax.paths import check_local
from train.finetune.config import TuneConfig, read_config


@dataclass(frozen=True)
class Arguments:
    """Fine-tune a model; goes on where a run in the same folder stopped.

    Attributes:
        settings: of the run.
        out: folder of the run; not needed with --dry-run.
        config: YAML file with settings; flags override it.
        stop_after: stop after this many steps in all.
        dry_run: compile the step, print memory and FLOPs of each device, and stop.
        topology: for --dry-run: a TPU topology such as v5e:8x8 or v5p:2x2x4 (needs libtpu).
        distributed: one process of several: "auto" on TPU pods, Slurm and Open MPI, or
            HOST:PORT,PROCESSES,INDEX; HOST:PORT is the first process's. Otherwise the
            environment variable KVJAX_DISTRIBUTED, if there is one.
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
    """Arguments from flags, over those of --config."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    config = first.parse_known_args(argv)[0].config
    default = None if config is None else Arguments(read_config(config))
    prog = "python -m train finetune"
    if default is None:
        return tyro.cli(Arguments, prog=prog, args=argv)
    return tyro.cli(Arguments, prog=prog, args=argv, default=default)


def tune(arguments: Annotated[Arguments, tyro.conf.arg(name="")]) -> None:
    """Fine-tune a model; goes on where a run in the same folder stopped.

    Raises:
        ValueError: see `train.finetune.run.finetune`.
    """
    check_local(arguments)
    # orbax logs a traceback of what it raises anyway.
    absl.logging.set_verbosity(absl.logging.FATAL)
    processes.join(arguments.distributed)
    if arguments.dry_run:
        from train.finetune.dry_run import dry_run

        if arguments.topology is not None:  # programs for other devices cannot be read back
            compilation_cache.enable("off")
        report = dry_run(arguments.settings, arguments.topology)
    else:
        from train.finetune.run import finetune

        if arguments.out is None:
            raise ValueError("got no --out, expected a folder for the run")
        report = finetune(arguments.settings, arguments.out, arguments.stop_after)
    if not processes.is_writer():
        return
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    print_report(report)


def print_report(report: dict[str, Any]) -> None:
    """One line a fact."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "", show_header=False)
    for key, value in report.items():
        table.add_row(key, f"{value:,}" if isinstance(value, int) else str(value))
    Console().print(table)
