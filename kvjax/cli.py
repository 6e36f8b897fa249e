"""The `kvjax` command: generate, chat, compress, demo, score, convert, export, info, plan.

Each function here is a subcommand: tyro makes the options from its signature. The function checks
what belongs to the command line, calls `kvjax.commands` or `kvjax.capacity`, and prints the result.
Those are imported inside the functions: help and refused arguments do not wait for them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from rich.console import Console
from rich.table import Table
from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction, arg

from kvjax import compilation_cache
from kvjax.endings import GOES_ON, NOTHING_YET, STARTS_OVER, endings, only_writer, say
from kvjax.overview import overview
from kvjax.paths import local_arguments
from kvjax.runs import write_json
from kvjax.usage import changed, check_command, parsed, refuse_unread

if TYPE_CHECKING:
    from kvjax.commands.convert import DecoupledSettings, EqualCacheSettings
    from kvjax.headkv.examples import Grid

Json = Annotated[Path | None, arg(name="json", help="also write the result as JSON to this file")]
Model = Annotated[
    Positional[str],
    arg(help="checkpoint directory, .gguf file, hub id, or builtin:<name>", metavar="MODEL"),
]
DtypeName = Literal["float32", "bfloat16", "float16"]
Dtype = Annotated[
    DtypeName | None,
    arg(help="of weights, activations, cache; None: bfloat16 on accelerators, float32 on CPUs"),
]

MeshText = Annotated[
    str | None, arg(name="mesh", help="devices to shard over, such as data=2,fsdp=1,tensor=4")
]


def info(
    model: Model,
    tensors: Annotated[
        tuple[str, ...], arg(help="check and summarise tensors whose names match these patterns")
    ] = (),
    json_file: Json = None,
) -> None:
    """Prints the facts of a checkpoint and the bytes of its KV cache.

    With --tensors, also prints statistics of the named tensors. NaN or infinity is an error.

    Example: kvjax info MODEL
    """
    from kvjax.commands.checkpoints import describe, tensor_statistics

    facts = describe(model)
    _print_facts(model, facts)
    if tensors:
        facts["tensors"] = tensor_statistics(model, tensors)
        _print_rows(facts["tensors"])
    _write_report(json_file, facts)


def convert(
    model: Model,
    out: Annotated[Positional[Path], arg(help="directory to write", metavar="OUT")],
    equal_cache: OmitArgPrefixes[EqualCacheSettings],
    decoupled: OmitArgPrefixes[DecoupledSettings],
    method: Annotated[
        Literal["equal_cache", "decoupled"],
        arg(help="equal_cache: same cache, more expressive; decoupled: a smaller cache"),
    ] = "equal_cache",
    mesh: MeshText = None,
    dtype: Dtype = None,
    json_file: Json = None,
) -> None:
    """Converts grouped-query to latent attention (TransMLA).

    It works layer by layer, so a model larger than the memory fits.
    If a run was interrupted, the same command continues where the run stopped.

    Example: kvjax convert MODEL OUT --method decoupled --calibration text.txt
    """
    from kvjax.commands.convert import (
        DecoupledSettings,
        EqualCacheSettings,
        convert_to_decoupled,
        convert_to_equal_cache,
    )

    given = {
        "equal_cache": changed(EqualCacheSettings, vars(equal_cache)),
        "decoupled": changed(DecoupledSettings, vars(decoupled)),
    }
    refuse_unread("--method", method, given)
    fold = changed(DecoupledSettings, vars(decoupled), "fold")
    refuse_unread("--recipe", decoupled.recipe, {"published": fold})
    with only_writer(out, GOES_ON):
        if method == "equal_cache":
            report = convert_to_equal_cache(model, out, equal_cache, dtype, mesh)
        else:
            report = convert_to_decoupled(model, out, decoupled, dtype, mesh)
    _print_facts(f"{model} → {out}", report)
    _write_report(json_file, report)


def export(
    model: Model,
    out: Annotated[Positional[Path], arg(help="directory to write", metavar="OUT")],
    norm: Annotated[
        Literal["neutral", "rms"],
        arg(help="neutral: exact, for transformers; rms: for engines, to be healed by training"),
    ] = "neutral",
    calibration: Annotated[
        Path | None, arg(help="for rms: a text file, or token ids [S, T] in a .npy file")
    ] = None,
    calibration_tokens: int = 32_768,
    max_shard_bytes: Annotated[int, arg(help="largest size of a file of weights")] = 5 * 10**9,
    dtype: Dtype = None,
    json_file: Json = None,
) -> None:
    """Writes a converted model for transformers' DeepseekV3ForCausalLM.

    Copies tokenizer and generation defaults too, and checks the written files.

    Example: kvjax export CONVERTED OUT
    """
    from kvjax.commands.checkpoints import export_checkpoint

    of_rms = changed(export, locals(), "calibration", "calibration_tokens")
    refuse_unread("--norm", norm, {"rms": of_rms})
    with only_writer(out, NOTHING_YET):
        report = export_checkpoint(
            model, out, norm, calibration, calibration_tokens, dtype, max_shard_bytes
        )
    _print_facts(f"{model} → {out}", report)
    _write_report(json_file, report)


def score(
    model: Model,
    out: Annotated[Positional[Path], arg(help="score file to write", metavar="OUT.json")],
    examples: OmitArgPrefixes[Grid],
    batch_size: Annotated[int, arg(help="examples at a time")] = 8,
    mesh: MeshText = None,
    dtype: Dtype = None,
    json_file: Json = None,
) -> None:
    """Measures how much each attention head matters (HeadKV).

    If a run was interrupted, the same command continues where the run stopped.

    Example: kvjax score MODEL MODEL/head_scores.json
    """
    from kvjax.commands.score import score_checkpoint

    with only_writer(out, GOES_ON):
        report = score_checkpoint(model, out, examples, batch_size, dtype, mesh)
    _print_facts(f"{model} → {out}", report)
    _say_notes(report)
    _write_report(json_file, report)


Raw = Annotated[bool, arg(help="read the text as it is, without the tokenizer's chat template")]
System = Annotated[str | None, arg(help="system message, for the chat template")]
BEFORE_QUESTIONS = "full:entries=int8"
"""For texts whose questions come later, and for chats. It keeps every token: a policy that does not
know the question drops answers, even at half of the tokens (docs/headkv.md). Keys and values would
take 4 bits, but latents of converted models lose half of the answers then (docs/frontier.md)."""
PolicyName = Annotated[
    str, arg(help="what the cache keeps, such as full:entries=int4; see docs/headkv.md")
]
NewTokens = Annotated[int, arg(help="longest answer")]
Temperature = Annotated[float, arg(help="0 takes the most likely token, above it tokens are drawn")]
Stop = Annotated[
    UseAppendAction[tuple[str, ...]],
    arg(metavar="TEXT", help="end the answer before this text; repeat for more"),
]


def generate(
    model: Model,
    prompt: Annotated[
        Positional[str | None],
        arg(
            help="question to answer, or text to continue; - reads standard input", metavar="PROMPT"
        ),
    ] = None,
    prompt_file: Annotated[Path | None, arg(help="file with the prompt, instead")] = None,
    max_new_tokens: NewTokens = 64,
    policy: Annotated[
        str,
        arg(
            help="full, full:entries=int4, headkv:ratio=0.2, snapkv:kv_size=64, …; kvjax --help "
            "has the names, docs/headkv.md the settings"
        ),
    ] = "full",
    temperature: Temperature = 0.0,
    top_p: Annotated[float, arg(help="draw from the likeliest tokens of this probability")] = 1.0,
    top_k: Annotated[int, arg(help="draw from this many likeliest tokens; 0 for all")] = 0,
    seed: int = 0,
    raw: Raw = False,
    system: System = None,
    stop: Stop = (),
    context: Annotated[
        Path | None, arg(help="file of `kvjax compress`: continue its text, with its policy")
    ] = None,
    mesh: MeshText = None,
    dtype: Dtype = None,
    json_file: Json = None,
) -> None:
    """Answers a question, or continues a text, over a compressed cache.

    Tokens appear one by one. A model whose tokenizer has a chat template answers; any other
    continues the text.

    Example: kvjax generate MODEL "What is a cache?" --policy snapkv:kv_size=64
    """
    from kvjax.commands.text import continue_text, prompt_of

    text = prompt_of(prompt, prompt_file)
    # Greedy decoding ignores the settings of sampling.
    if temperature == 0:
        of_sampling = changed(generate, locals(), "top_p", "top_k")
        refuse_unread("--temperature", "0", {"above 0": of_sampling})
    report = continue_text(
        model,
        text,
        max_new_tokens=max_new_tokens,
        policy=policy,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        chat=False if raw else None,
        system=system,
        stop=stop,
        context=context,
        dtype=dtype,
        mesh=mesh,
        write=lambda text: print(text, end="", flush=True),
    )
    print()
    # On standard error, so that standard output is the text alone.
    say(f"[{report['new_tokens']} tokens; {_sizes(report)}]")
    _say_notes(report)
    _write_report(json_file, report)


def _sizes(report: Mapping[str, Any]) -> str:
    """What the cache of a prompt takes. Rows come in blocks, and there is room for new tokens."""
    whole = f"{report['cache_bytes']:,} bytes"
    if "prompt_bytes" not in report:
        return f"cache {whole} with the context and room for the answer"
    kept, full = report["prompt_bytes"], report["full_prompt_bytes"]
    share = f"{kept:,} of {full:,} bytes ({kept / full:.0%}) of {report['prompt_tokens']:,} tokens"
    return f"the cache keeps {share}; {whole} with room for the answer"


def chat(
    model: Model,
    policy: PolicyName = BEFORE_QUESTIONS,
    document: Annotated[Path | None, arg(help="text file that the chat is about")] = None,
    context: Annotated[
        Path | None, arg(help="file of `kvjax compress` that the chat is about, with its policy")
    ] = None,
    system: System = None,
    max_new_tokens: NewTokens = 256,
    temperature: Temperature = 0.0,
    seed: int = 0,
    stop: Stop = (),
    dtype: Dtype = None,
    json_file: Json = None,
) -> None:
    """Answers messages, one a line of standard input, over a small cache.

    Under each answer stand the bytes of the cache, the time to the first token and tokens/s.

    Example: kvjax chat MODEL --document book.txt --policy full:entries=int4
    """
    from kvjax.commands.chat import chat as run_chat

    if context is not None and changed(chat, locals(), "policy", "document", "system"):
        raise ValueError("--context has a policy, a text and a system message: give no other one")
    sampling = {"temperature": temperature, "seed": seed}
    rows = run_chat(
        model,
        policy,
        context,
        document,
        system,
        dtype,
        max_new_tokens=max_new_tokens,
        stop=stop,
        **sampling,
    )
    _write_report(json_file, rows)


def compress(
    model: Model,
    text: Annotated[Positional[Path], arg(help="text file to read", metavar="TEXT")],
    out: Annotated[Positional[Path], arg(help="file to write", metavar="OUT")],
    policy: PolicyName = BEFORE_QUESTIONS,
    raw: Raw = False,
    system: System = None,
    dtype: Dtype = None,
    json_file: Json = None,
) -> None:
    """Reads a text once, and writes its compressed cache.

    Questions come later, with `kvjax generate --context OUT` or `kvjax chat --context OUT`.
    With a chat template the text begins a user's message, and each question ends it.

    Example: kvjax compress MODEL book.txt book.kv --policy full:entries=int4
    """
    from kvjax.commands.text import compress_text

    with only_writer(out, NOTHING_YET):
        chat = False if raw else None
        report = compress_text(model, text, out, policy, dtype, chat, system)
    _print_facts(f"{text} → {out}", report)
    _say_notes(report)
    _write_report(json_file, report)


def demo(
    out: Annotated[Path, arg(help="directory for report.json and pictures")] = Path("demo_out"),
    model: Annotated[
        str | None,
        arg(help="any checkpoint; None: builtin:smollm2 if installed, otherwise builtin:needle"),
    ] = None,
    samples: Annotated[
        int | None, arg(help="prompts per task and setting; None: 32 for builtin:needle, else 16")
    ] = None,
    seed: int = 0,
    json_file: Json = None,
) -> None:
    """Shows answers and accuracy against cache bytes, on one model.

    Then the importance of its heads, and a conversion.

    Example: kvjax demo --model MODEL
    """
    from kvjax.commands.demo import run_demo

    with only_writer(out, STARTS_OVER):
        _write_report(json_file, run_demo(out, model, samples, seed))


def plan(
    config: Annotated[
        Positional[str], arg(help="config.json, or a checkpoint as elsewhere", metavar="CONFIG")
    ],
    topology: Annotated[str, arg(help="devices, such as v5e:4x4, v5p:2x2x4 or h200:8")],
    batch: Annotated[int | None, arg(help="sequences; default: one per replica")] = None,
    context: Annotated[int, arg(help="prompt tokens per sequence")] = 32_768,
    new_tokens: int = 128,
    mesh: Annotated[
        str | None, arg(help="such as data=2,tensor=8; default: tensor by the number of KV heads")
    ] = None,
    policies: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(name="policy", metavar="POLICY", help="besides full and 8-bit caches; repeat for more"),
    ] = (),
    latent: Annotated[
        tuple[int, int] | None,
        arg(
            help="latent and rotary key of the converted model; default: 512 128, or half the cache"
        ),
    ] = None,
    check: Annotated[bool, arg(help="also compile a step of all layers and compare")] = False,
    dtype: Annotated[DtypeName, arg(help="dtype of weights, activations and cache")] = "bfloat16",
    compile: Annotated[
        Literal["block", "step"] | None,
        arg(help="a decode step is one program per layer, or one program; default: by new tokens"),
    ] = None,
    json_file: Json = None,
) -> None:
    """Says what fits on other devices: bytes, batch, longest context.

    Compiles prefill and decode for the topology without weights or devices. This needs the
    topology's compiler: libtpu, or jax's CUDA plugin.

    Example: kvjax plan MODEL --topology v5e:4x4 --context 131072
    """
    from kvjax.capacity.plan import Request, plan_capacity, readable

    compilation_cache.enable("off")  # programs for other devices cannot be read back
    request = Request(
        config,
        topology,
        context,
        new_tokens,
        batch,
        mesh,
        policies or Request.policies,  # tyro appends to the default, so the default is empty here
        latent,
        dtype,
        compile,
    )
    report = plan_capacity(request, check)
    rows, notes = report.pop("rows"), report.pop("notes")
    checked = report.pop("check", None)
    _print_facts(config, report)
    _print_rows(readable(rows))
    if checked is not None:
        _print_facts("decode, all layers", checked)
    for note in notes:
        Console().print(note)
    _write_report(json_file, {**report, "notes": notes, "rows": rows, "check": checked})


GROUPS = {
    "Ask a model over a smaller cache": (generate, chat, compress, demo),
    "Prepare a model": (score, convert, export),
    "Look before you run": (info, plan),
}
COMMANDS = {command.__name__: command for group in GROUPS.values() for command in group}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; see `kvjax.endings` for bad input and signals."""
    with endings("kvjax"):
        # Every command has this flag, so it is taken out before tyro sees the arguments.
        folder, argv = compilation_cache.take_flag(list(sys.argv[1:] if argv is None else argv))
        compilation_cache.enable(folder)
        if argv[:1] in (["-h"], ["--help"]):
            print(overview(GROUPS))
            return
        check_command(argv, COMMANDS)
        parsed({name: _parsed(name, argv) for name in COMMANDS}, "kvjax", argv)


def _parsed(name: str, argv: Sequence[str]) -> Callable[..., Any]:
    """A command as tyro needs it: without parameters if the arguments are not for this command."""
    command = COMMANDS[name]
    if argv[:1] != [name]:

        def unparsed() -> None: ...

        unparsed.__doc__ = command.__doc__
        return unparsed
    if name in ("convert", "score"):
        _import_types()
    # A URL in place of a path is refused before the command does any work.
    return local_arguments(command)


def _import_types() -> None:
    """Imports the types of parameters whose modules are slow to import, for tyro to read."""
    from kvjax.commands.convert import DecoupledSettings, EqualCacheSettings
    from kvjax.headkv.examples import Grid

    globals().update(
        {kind.__name__: kind for kind in (DecoupledSettings, EqualCacheSettings, Grid)}
    )


def _print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Prints a table with the first row's keys as its header. Nested values are left out."""
    columns = [key for key, value in rows[0].items() if not isinstance(value, dict | list)]
    table = Table(*columns)
    for row in rows:
        table.add_row(*(str(row[column]) for column in columns))
    Console().print(table)


def _print_facts(title: str, facts: dict[str, Any]) -> None:
    """Prints a table with one line per fact; notes are for `_say_notes`."""
    table = Table("", "", show_header=False, title=title)
    for key, value in facts.items():
        if key != "notes":
            table.add_row(key.replace("_", " "), str(value))
    Console().print(table)


def _say_notes(report: Mapping[str, Any]) -> None:
    """What a user may wonder about, on standard error."""
    for note in report["notes"]:
        say(f"note: {note}")


def _write_report(path: Path | None, report: Any) -> None:
    """Writes the result of a command where --json asks for it."""
    if path is not None:
        write_json(path, report)


if __name__ == "__main__":
    main()
