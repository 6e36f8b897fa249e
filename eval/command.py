"""`python -m eval TASK`: from the command line to a run, and its result as a table.

The measurements (perplexity, latency, lm-eval) share the types of options and the tables.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console
from rich.table import Column, Table
from tyro.conf import UseAppendAction, arg

from kvjax.paths import check_local, local_path
from kvjax.policies.named import parse_policy
from kvjax.runs import write_json
from kvjax.usage import parsed

Json = Annotated[Path | None, arg(name="json", help="also write the result as JSON to this file")]
Policies = Annotated[
    UseAppendAction[tuple[str, ...]],
    arg(name="policy", metavar="POLICY", help="full, snapkv:kv_size=128, …; repeat for several"),
]
Model = Annotated[str, arg(help="checkpoint directory, .gguf file, hub id, or builtin:<name>")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    arg(help="of weights, activations, cache; None: bfloat16 on accelerators, float32 on CPUs"),
]
MeshText = Annotated[
    str | None,
    arg(name="mesh", help="devices of a process to spread over, such as data=2,tensor=2"),
]


@dataclass(frozen=True)
class TaskCommand:
    """Runs a task and writes its folder: config.json, predictions.jsonl, results.json.

    Repeating the command continues an interrupted run. An option that the task would ignore is an
    error.

    Attributes:
        out: folder of the run.
        data_dir: folder with the task's files.
        limit: number of items of each subset, from its start.
        lengths: prompt lengths in tokens, for tasks that make their prompts.
        count: prompts of each length and depth, for tasks that make their prompts; 20 by default.
        subsets: the task's subsets to run; all by default.
        shots: examples in the prompt, where the task has a choice.
        seed: of generated prompts and of sampled answers.
        protocol: teacher: feed the right answer through the compressed cache; after: the same, with
            the question asked after the compression.
        chat: prompts inside the tokenizer's chat template.
        max_length: tokens of prompt and answer, where it is less than the model's context.
        max_new_tokens: longest answer, where it is less than the task's.
        truncate: remove the middle or the start of long prompts, instead of the task's own rule.
        unsafe_execution: run programs that a model wrote even where no sandbox is available.
        dry_run: print items, prompt tokens, shapes and cache bytes, and stop. Bytes are those of a
            single device, even with --mesh.
    """

    model: Model
    policy: Policies = ()
    out: Path | None = None
    data_dir: Path | None = None
    limit: int | None = None
    lengths: tuple[int, ...] = ()
    count: int | None = None
    subsets: tuple[str, ...] = ()
    shots: int | None = None
    settings: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(name="set", metavar="KEY=VALUE", help="a setting of this task; repeat for several"),
    ] = ()
    seed: int = 0
    protocol: Literal["generate", "teacher", "after"] = "generate"
    chat: bool = False
    batch_size: int = 8
    max_length: int | None = None
    max_new_tokens: int | None = None
    truncate: Literal["middle", "left"] | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    unsafe_execution: bool = False
    dry_run: bool = False
    mesh: MeshText = None
    dtype: Dtype = None
    json_file: Json = None


TASK_FIELDS = ("data_dir", "limit", "lengths", "count", "subsets", "shots", "seed")


def run_task(name: str, argv: Sequence[str]) -> None:
    """Parses the arguments of the task `name` and runs it."""
    from eval.task import TASKS

    if name not in TASKS:
        raise ValueError(f"no task or command {name!r}, expected one of {', '.join(TASKS)}")
    command = parsed(TaskCommand, f"python -m eval {name}", argv)
    run_command(name, command, [name, *argv])


def run_command(name: str, command: TaskCommand, argv: Sequence[str]) -> None:
    """Runs the task or previews it, prints the result, and writes it where it was asked for.

    Args:
        argv: arguments of `python -m eval`, for results.json.
    """
    from kvjax import processes

    report = execute(name, command, argv)
    if not processes.is_writer():
        return
    (_print_dry_run if command.dry_run else print_report)(report)
    write_report(command.json_file, report)


def execute(name: str, command: TaskCommand, argv: Sequence[str]) -> dict[str, Any]:
    """Runs the task and returns results.json's content, or that of `dry_run`.

    Args:
        argv: for results.json.

    Raises:
        ValueError: see `check_arguments`, `checked` and `eval.run.evaluate`.
    """
    from eval.run import LoadedModel, evaluate
    from eval.task import load_task
    from kvjax.endings import GOES_ON, only_writer, say_finished
    from kvjax.hf import load, load_tokenizer, read_model
    from kvjax.mesh import named_mesh
    from kvjax.progress import stage

    # Everything that can be refused without the model comes first.
    command = with_dtype(command)
    check_arguments(command)
    _pairs(command.settings)
    if command.out is None and not command.dry_run:
        raise ValueError("give --out FOLDER for the run, or --dry-run")
    settings, read = checked(name, command)
    # The model's configuration is enough to make prompts; weights are loaded only for a real run.
    model = read_model(command.model)
    tokenizer = load_tokenizer(command.model)
    task = adapted(load_task(name, task_options(command, tokenizer, model.config)), command)
    if command.dry_run:
        return dry_run(model, tokenizer, task, settings, command.dtype)
    assert command.out is not None
    # config.json leaves data_dir out: the checksum of the items tells what the folder held.
    described = {n: getattr(command, n) for n in TASK_FIELDS if n not in ("data_dir", "seed")}
    described["count"] = task_options(command, None).prompts_each if "count" in read else None
    described |= {"settings": dict(_pairs(command.settings)), "truncate": task.truncate}
    with only_writer(command.out, GOES_ON):
        with stage(f"loading {command.model}"):
            model, params = load(command.model, command.dtype, named_mesh(command.mesh))
        loaded = LoadedModel(command.model, model, params, tokenizer)
        report = evaluate(loaded, task, settings, command.out, described, argv)
    if not report["computed"]:
        say_finished(command.out)
    return report


def alone(out: Path | None) -> AbstractContextManager[None]:
    """Keeps other processes from the folder of a measurement, which is written at the end."""
    from kvjax.endings import NOTHING_YET, only_writer

    return nullcontext() if out is None else only_writer(out, NOTHING_YET)


def with_dtype(command: Any) -> Any:
    """The command with a dtype: `kvjax.hf.default_dtype` where none was given."""
    from kvjax.hf import default_dtype

    return dataclasses.replace(command, dtype=command.dtype or default_dtype())


def check_arguments(command: Any) -> None:
    """Checks paths and policies, before a model is read.

    Raises:
        ValueError: a path that is a URL, a policy that does not exist, or a score file that cannot
            be read.
    """

    check_local(command)
    for policy in command.policy:
        parse_policy(policy)


def checked(name: str, command: TaskCommand) -> tuple[Any, tuple[str, ...]]:
    """The command's `eval.task.Settings`, and the names of the options that the task reads.

    Raises:
        ValueError: settings that do not fit each other, or an option without an effect.
    """
    from eval.task import Settings, check_options, reads_of

    # TaskCommand has a field for each setting, except that it calls policies `policy`.
    names = {field.name for field in dataclasses.fields(Settings)} - {"policies"}
    settings = Settings(
        policies=command.policy or ("full",), **{n: getattr(command, n) for n in names}
    )
    options = task_options(command, None)
    read = reads_of(name, options)
    check_options(name, options, read)
    # Fed answers are judged token by token, so settings of the score have no effect.
    if settings.protocol != "generate":
        idle = [key for key in options.settings if key in read.scoring]
        if idle:
            raise ValueError(
                f"--set {idle[0]} is for decoded answers, expected --protocol generate with it"
            )
    # Greedy answers draw no random numbers.
    if not settings.temperature:
        if settings.seed and "seed" not in read.options:
            raise ValueError(
                f"--seed is {settings.seed}, but task {name} draws no prompts and answers are "
                "greedy: expected a temperature above 0 with it"
            )
        samples = options.settings.get("samples", "1")
        if samples.isdecimal() and int(samples) > 1:
            raise ValueError(
                f"samples={samples} at temperature 0 would be one answer {samples} times, expected "
                "a temperature above 0 with it"
            )
    return settings, read.options


def adapted(task: Any, command: TaskCommand) -> Any:
    """The task with the command's --max-new-tokens and --truncate."""
    # The task's own rule and lengths stay where the command says nothing.
    if command.truncate is not None:
        task = dataclasses.replace(task, truncate=command.truncate)
    most = command.max_new_tokens
    if most is None:
        return task
    if most < 1:
        raise ValueError(f"max_new_tokens is {most}, expected ≥ 1")
    items = (
        dataclasses.replace(item, max_new_tokens=min(item.max_new_tokens, most))
        for item in task.items
    )
    return dataclasses.replace(task, items=tuple(items))


def task_options(command: TaskCommand, tokenizer: Any, config: Any = None) -> Any:
    """The command's options of the task, as `eval.task.TaskOptions`.

    Args:
        config: of the model, whose context bounds the prompts that a task makes.
    """
    from eval.task import TaskOptions

    settings = dict(_pairs(command.settings))
    if command.unsafe_execution:
        settings["unsafe_execution"] = "true"
    if command.data_dir is not None and not command.data_dir.is_dir():
        raise ValueError(f"no folder at {command.data_dir}")
    values = {name: getattr(command, name) for name in TASK_FIELDS}
    most = None
    if config is not None and command.truncate in (None, "refuse"):
        most = min(config.context_length, command.max_length or config.context_length)
    more = {"settings": settings, "chat": command.chat, "most_tokens": most}
    return TaskOptions(tokenizer=tokenizer, **more, **values)


def _pairs(settings: Sequence[str]) -> list[tuple[str, str]]:
    """Keys and values of --set; raises ValueError for other texts, repeated keys and URLs."""
    pairs = [setting.partition("=") for setting in settings]
    for place, (key, equals, value) in enumerate(pairs):
        if not key or not equals:
            raise ValueError(f"got --set {key}, expected --set KEY=VALUE")
        if key in {other for other, *_ in pairs[:place]}:
            raise ValueError(f"got --set {key} twice, expected it once")
        local_path(value, key)
    return [(key, value) for key, _, value in pairs]


def dry_run(model: Any, tokenizer: Any, task: Any, settings: Any, dtype: Any) -> dict[str, Any]:
    """The work of a run without its weights: items, prompt tokens and cache bytes by bucket.

    Args:
        dtype: dtype of the parameters in the real run.

    Returns:
        task, items, shapes (to compile for), buckets: [{bucket, max_new_tokens, batch, items,
        prompt_tokens, truncated, full_cache_bytes, gqa_cache_bytes, cache_bytes: {policy: bytes}}].
        Bytes are those of one sequence with room for its answer.

    Raises:
        ValueError: as `eval.run.evaluate`.
    """
    from eval import results
    from eval.prompts import encode, make_batches, shapes
    from eval.run import check_ids, resolve_all
    from eval.task import check_form

    # The checks of `evaluate`, so that a command that would fail fails here too.
    check_ids(task)
    check_form(task, settings)
    policies = resolve_all(settings.policies, model)
    prompts = encode(task, tokenizer, model.config, settings.chat, settings.max_length)
    batches = make_batches(prompts, task.items, settings.batch_size, settings.seed)
    # Shapes are the ones that `evaluate` would compile, because batches are made the same way.
    buckets = []
    for shape, members in shapes(batches).items():
        lengths = [len(prompt.ids) for prompt in members]
        buckets.append(
            {
                "bucket": shape.bucket,
                "max_new_tokens": shape.max_new_tokens,
                "batch": shape.batch,
                "items": len(members),
                "prompt_tokens": {"least": min(lengths), "most": max(lengths)},
                "truncated": sum(prompt.truncated for prompt in members),
                "full_cache_bytes": results.uncompressed_bytes(model, dtype, shape),
                "gqa_cache_bytes": results.gqa_bytes(model, dtype, shape),
                "cache_bytes": {
                    name: results.policy_bytes(model, dtype, policy, shape)
                    for name, policy in policies.items()
                },
            }
        )
    return {
        "task": task.name,
        "items": len(task.items),
        "shapes": len({(row["bucket"], row["batch"]) for row in buckets}),
        "buckets": buckets,
    }


def print_report(report: dict[str, Any]) -> None:
    """A table with one line for each policy, and one for each group where there are at most 24."""
    title = f"{report['task']}, {report['model']}: {report['metric']}"
    policy = Column("policy", overflow="fold")  # names of policies can be long; none is cut
    table = Table(policy, report["metric"], "items", "cache, KiB", "of full", title=title)
    for row in report["policies"]:
        # Bytes and share are means over the items, so groups have none.
        share = row["cache_bytes"] / row["full_cache_bytes"]
        size = f"{row['cache_bytes'] / 1024:.0f}"
        table.add_row(row["policy"], _score(row["all"]), str(report["items"]), size, f"{share:.1%}")
        groups = row["groups"] if len(row["groups"]) <= 24 else {}
        for name, part in groups.items():
            table.add_row(f"  {name}", _score(part), str(part["items"]), "", "")
    Console().print(table)
    truncated = report["policies"][0]["truncated"]
    if truncated:
        Console().print(f"{truncated} of {report['items']} prompts were cut to the context.")


def print_rows(rows: Sequence[dict[str, Any]], title: str = "") -> None:
    """A table with one line for each row and the first row's keys as its header."""
    table = Table(*(Column(name, overflow="fold") for name in rows[0]), title=title)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)


def write_report(path: Path | None, report: Any) -> None:
    """Writes the result of a command where --json asks for it."""
    if path is not None:
        write_json(path, report)


def _print_dry_run(found: dict[str, Any]) -> None:
    rows = [
        {
            "bucket": row["bucket"],
            "new": row["max_new_tokens"],
            "items": row["items"],
            "prompt tokens": f"{row['prompt_tokens']['least']}–{row['prompt_tokens']['most']}",
            "truncated": row["truncated"],
            "batch": row["batch"],
            "full, KiB": f"{row['full_cache_bytes'] / 1024:.0f}",
            **{name: f"{held / 1024:.0f}" for name, held in row["cache_bytes"].items()},
        }
        for row in found["buckets"]
    ]
    print_rows(rows, f"{found['task']}: {found['items']} items, {found['shapes']} shapes")


def _score(part: dict[str, Any]) -> str:
    error = part["standard_error"]
    return f"{part['score']:.3f}" + ("" if error is None else f" ± {error:.3f}")
