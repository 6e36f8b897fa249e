"""`python -m train`: pretrain and fine-tune models, draw data for it, export, evaluate, plot."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from kvjax import compilation_cache, processes
from kvjax.paths import local_arguments
from train.compare.command import compare
from train.curve import plot_curve
from train.evaluate import evaluate
from train.export import export
from train.families import write_rows
from train.finetune import command
from train.pretrain import pretrain
from train.recipe import read_recipe


def pretrain_command(config: Path, out: Path, max_steps: int | None = None) -> None:
    """Pretrain from a recipe; resumes where a run in the same folder stopped.

    Args:
        config: YAML recipe, e.g. train/recipes/needle.yaml.
        out: folder for checkpoints and metrics.jsonl.
        max_steps: stop after this many steps.
    """
    pretrain(read_recipe(config), out, max_steps)


def export_command(config: Path, run: Path, out: Path, dtype: str = "bfloat16") -> None:
    """Write the newest checkpoint of a pretraining run in Hugging Face's layout.

    Args:
        config: the recipe of the run.
        run: its folder.
        out: folder for the model and its tokenizer.
        dtype: of the weights in the file.
    """
    export(read_recipe(config), run, out, dtype)


def evaluate_command(
    model: str,
    out: Path | None = None,
    tasks: tuple[str, ...] = ("needle", "multi_key", "two_hop", "two_hop_crowded"),
    lengths: tuple[int, ...] = (256, 512, 1024),
    count: int = 200,
    dtype: str = "bfloat16",
) -> None:
    """Accuracy on unseen prompts, with the full cache.

    Args:
        model: a directory, or builtin:needle.
        out: JSON file for the result.
        tasks: names of kvjax.tasks.recall.
        lengths: tokens of the prompts.
        count: prompts for each task and length.
        dtype: of the parameters.
    """
    evaluate(model, out, tasks, lengths, count, dtype)


def curve_command(config: Path, metrics: Path, out: Path) -> None:
    """Draw the log of a pretraining run.

    Args:
        config: the recipe of the run.
        metrics: its metrics.jsonl.
        out: PNG file.
    """
    plot_curve(read_recipe(config), metrics, out)


def family_command(
    name: str, out: Path, count: int = 5000, seed: int = 0, split: str = "train"
) -> None:
    """Write problems of a family for fine-tuning, one JSON object with query and response a line.

    Args:
        name: word_problems or programs.
        out: the file.
        count: problems.
        seed: other seeds give other problems.
        split: train or test; they share no query.
    """
    write_rows(out, name, count, seed, split)


COMMANDS = {
    "pretrain": pretrain_command,
    "export": export_command,
    "evaluate": evaluate_command,
    "curve": curve_command,
    "finetune": command.tune,
    "compare": compare,
    "family": family_command,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; bad input is one line on standard error and exit code 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        folder, argv = compilation_cache.take_flag(argv)
        if argv[:1] == ["finetune"]:
            # Apart: its flags override a file that one of them names.
            arguments = command.parse(argv[1:])
            compilation_cache.enable(folder, processes.asked(arguments.distributed))
            with processes.together():
                command.tune(arguments)
        else:
            compilation_cache.enable(folder)
            commands = {name: local_arguments(command) for name, command in COMMANDS.items()}
            tyro.extras.subcommand_cli_from_dict(
                commands,
                prog="python -m train",
                description=compilation_cache.HELP,
                args=argv,
            )
    except (ValueError, OSError) as error:
        print(f"train: error: {' '.join(str(error).split())}", file=sys.stderr)
        processes.stop(2)


if __name__ == "__main__":
    main()
