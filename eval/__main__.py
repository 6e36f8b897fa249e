"""`python -m eval`: scores of a model whose cache is compressed, and the cost of the cache."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "perplexity": ("eval.perplexity", "main"),
    "latency": ("eval.latency", "main"),
    "lm-eval": ("eval.lm_eval", "main"),
    "report": ("eval.report.command", "report"),
    "run": ("eval.suites", "main"),
}
"""Commands besides the tasks: module and function. `main` takes argv, tyro calls the others."""

SHARED = ("run",)
"""Commands that several processes share, as they share tasks. Process 0 runs the others alone."""

HELP = """usage: python -m eval COMMAND [OPTIONS]

tasks:     {tasks}
           python -m eval TASK --help
commands:  perplexity  of a text, dense, in overlapping chunks, or from a compressed prefix
           latency     time and cache bytes against context and batch
           lm-eval     lm-evaluation-harness through the compressed cache
           report      tables and pictures of finished runs
           run         FILE.yaml: a suite, several of these

--distributed auto|HOST:PORT,PROCESSES,INDEX (or KVJAX_DISTRIBUTED): one of several processes, which
share the items of each task
{cache}
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; see `kvjax.endings` for bad input and signals."""
    argv = list(sys.argv[1:] if argv is None else argv)
    from eval.task import TASKS
    from kvjax import compilation_cache, processes
    from kvjax.endings import endings
    from kvjax.usage import check_command

    if not argv or argv[0] in ("-h", "--help"):
        print(HELP.format(tasks=", ".join(TASKS), cache=compilation_cache.HELP))
        sys.exit(0 if argv else 2)
    with endings("eval"):
        # These two options belong to every command, so they are taken before a command's parser.
        folder, argv = compilation_cache.take_flag(argv)
        distributed, argv = processes.take_flag(argv)
        compilation_cache.enable(folder, processes.asked(distributed))
        processes.join(distributed)
        check_command(argv, [*TASKS, *COMMANDS])
        with processes.together():
            dispatch(argv[0], argv[1:])


def dispatch(name: str, argv: list[str]) -> None:
    """Runs a task or a command."""
    from kvjax import processes

    if name in COMMANDS:
        module, function = COMMANDS[name]
        command = getattr(importlib.import_module(module), function)
        # Two processes would measure the same and write the same files.
        if name not in SHARED and not processes.is_writer():
            return
        if function == "main":
            command(argv)
        else:
            from kvjax.usage import parsed

            parsed(command, f"python -m eval {name}", argv)
        return
    # Imported late: a wrong name is answered without loading a model's code.
    from eval.command import run_task

    run_task(name, argv)


if __name__ == "__main__":
    main()
