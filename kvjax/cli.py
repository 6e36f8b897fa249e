"""The `kvjax` command: info, convert, export, score, compress, generate, plan, demo.

Heavy imports wait until a command needs them, so that `kvjax --help` is instant.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional, UseAppendAction, arg

from kvjax import compilation_cache
from kvjax.paths import local_arguments

Json = Annotated[Path | None, arg(name="json", help="also write the result as JSON to this file")]
Model = Annotated[
    Positional[str], arg(help="checkpoint directory, hub id, or builtin:<name>", metavar="MODEL")
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"], arg(help="dtype of weights, activations and cache")
]

MeshText = Annotated[
    str | None, arg(name="mesh", help="devices to spread over, such as data=2,fsdp=1,tensor=4")
]


def info(
    model: Model,
    tensors: Annotated[
        tuple[str, ...], arg(help="check and summarise tensors whose names match these patterns")
    ] = (),
    json_file: Json = None,
) -> None:
    """What a checkpoint is, and what its KV cache costs.

    With --tensors, the values of the named tensors too; NaN or infinite ones are an error.
    """
    from kvjax.pipelines import info as pipeline

    facts = pipeline.describe(model)
    _print_facts(model, facts)
    if tensors:
        facts["tensors"] = pipeline.tensor_statistics(model, tensors)
        _print_rows(facts["tensors"])
    _write_json(json_file, facts)


def convert(
    model: Model,
    out: Annotated[Positional[Path], arg(help="directory to write", metavar="OUT")],
    method: Annotated[
        Literal["equal_cache", "decoupled"],
        arg(help="equal_cache: same cache, more expressive; decoupled: a smaller cache"),
    ] = "equal_cache",
    init: Annotated[
        str, arg(help="equal_cache: svd_global, svd_per_head, identity or svd_complex")
    ] = "svd_global",
    rope_site: Annotated[str, arg(help="equal_cache: after_up or before_up")] = "after_up",
    kv_rank: Annotated[int, arg(help="decoupled: width of the cached latent")] = 448,
    rope_dim: Annotated[int, arg(help="decoupled: width of the cached rotary key")] = 128,
    v_head_dim: Annotated[int | None, arg(help="decoupled: width of a head's output")] = None,
    calibration: Annotated[
        Path | None, arg(help="decoupled: text, or .npy of token ids [S, T], to calibrate on")
    ] = None,
    calibration_tokens: int = 32_768,
    calibration_length: Annotated[int, arg(help="tokens a sequence, for texts")] = 256,
    stats: Annotated[
        Path | None, arg(help="decoupled: keep the moments in this file, and go on from it")
    ] = None,
    exportable: Annotated[
        bool, arg(help="decoupled: keep to what DeepSeek-V3's layout can express")
    ] = False,
    mode: Annotated[str, arg(help="decoupled: fold, post or auto")] = "auto",
    recipe: Annotated[str, arg(help="decoupled: best, unbiased or published")] = "best",
    fold: Annotated[int, arg(help="FreqFold of the published recipe; 0: the best")] = 1,
    mesh: MeshText = None,
    dtype: Dtype = "float32",
    json_file: Json = None,
) -> None:
    """Converts a GQA checkpoint to latent attention (TransMLA), a layer at a time from and to disk.

    An interrupted run continues where it stopped when the same command is given again.
    """
    given = locals()
    _refuse_others(convert, given, OF_METHOD, method, "--method")
    _refuse_others(convert, given, {"published": ("fold",)}, recipe, "--recipe")
    if method == "equal_cache":
        from kvjax.pipelines.convert import convert_checkpoint

        report = convert_checkpoint(
            model, out, method=method, init=init, rope_site=rope_site, dtype=dtype, mesh=mesh
        )
    else:
        from kvjax.pipelines.decouple import Decoupling, decouple_checkpoint

        if calibration is None:
            raise ValueError("method 'decoupled' needs --calibration FILE, a text or token ids")
        wanted = Decoupling(
            kv_rank=kv_rank,
            rope_dim=rope_dim,
            calibration=calibration,
            v_head_dim=v_head_dim,
            exportable=exportable,
            mode=mode,
            recipe=recipe,
            fold=fold,
            tokens=calibration_tokens,
            length=calibration_length,
            stats=stats,
        )
        report = decouple_checkpoint(model, out, wanted, dtype, mesh)
    _print_facts(f"{model} → {out}", report)
    _write_json(json_file, report)


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
    max_shard_bytes: Annotated[int, arg(help="split the weights into files of this size")] = 5
    * 10**9,
    dtype: Dtype = "float32",
    json_file: Json = None,
) -> None:
    """Writes a model of the decoupled conversion as transformers' DeepseekV3ForCausalLM.

    Tokenizer and generation defaults come along; what was written is checked in the end.
    """
    of_norm = {"rms": ("calibration", "calibration_tokens")}
    _refuse_others(export, locals(), of_norm, norm, "--norm")
    from kvjax.pipelines.export import export_checkpoint

    report = export_checkpoint(
        model, out, norm, calibration, calibration_tokens, dtype, max_shard_bytes
    )
    _print_facts(f"{model} → {out}", report)
    _write_json(json_file, report)


def score(
    model: Model,
    out: Annotated[Positional[Path], arg(help="score file to write", metavar="OUT.json")],
    estimator: Annotated[
        str, arg(help="retrieval, retrieval_reasoning, enhanced_retrieval, copying or gradient")
    ] = "retrieval_reasoning",
    samples: Annotated[int, arg(help="examples to ask")] = 64,
    length: Annotated[int, arg(help="longest prompt, in tokens")] = 512,
    seed: int = 0,
    batch_size: Annotated[int, arg(help="examples at a time")] = 8,
    haystack: Annotated[
        Path | None, arg(help="text file to hide the facts in, instead of generated sentences")
    ] = None,
    mesh: MeshText = None,
    dtype: Dtype = "float32",
    json_file: Json = None,
) -> None:
    """Measures the importance of every attention head (HeadKV) and writes a score file.

    An interrupted run continues where it stopped when the same command is given again.
    """
    from kvjax.pipelines.questions import Grid
    from kvjax.pipelines.score import score_checkpoint

    grid = Grid(estimator, samples, length, seed, haystack)
    report = score_checkpoint(model, out, grid, batch_size, dtype, mesh)
    _print_rows([report])
    _write_json(json_file, report)


def generate(
    model: Model,
    prompt: Annotated[Positional[str], arg(help="text to continue", metavar="PROMPT")],
    max_new_tokens: int = 64,
    policy: Annotated[str, arg(help="full, snapkv:kv_size=128, headkv:kv_size=128, …")] = "full",
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    context: Annotated[
        Path | None, arg(help="go on from a text that `kvjax compress` read; its policy holds")
    ] = None,
    mesh: MeshText = None,
    dtype: Dtype = "float32",
    json_file: Json = None,
) -> None:
    """Continues a text; tokens appear as they are made."""
    if temperature == 0:
        of_sampling = {"above 0": ("top_p", "top_k")}
        _refuse_others(generate, locals(), of_sampling, "0", "--temperature")
    from kvjax.pipelines.text import generate_text

    report = generate_text(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        policy=policy,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        context=context,
        dtype=dtype,
        mesh=mesh,
        write=lambda text: print(text, end="", flush=True),
    )
    print()
    print(
        f"[{report['new_tokens']} tokens; cache {report['cache_bytes']:,} bytes, "
        f"uncompressed {report['full_cache_bytes']:,}]",
        file=sys.stderr,
    )
    _write_json(json_file, report)


def compress(
    model: Model,
    text: Annotated[Positional[Path], arg(help="text file to read", metavar="TEXT")],
    out: Annotated[Positional[Path], arg(help="file to write", metavar="OUT")],
    policy: Annotated[str, arg(help="what to keep: snapkv:kv_size=128, …")] = "headkv:kv_size=512",
    dtype: Dtype = "float32",
    json_file: Json = None,
) -> None:
    """Reads a text once and keeps its compressed cache, for `kvjax generate --context OUT`."""
    from kvjax.pipelines.text import compress_text

    report = compress_text(model, text, out, policy, dtype)
    _print_rows([report])
    _write_json(json_file, report)


def demo(
    out: Annotated[Path, arg(help="directory for report.json and pictures")] = Path("demo_out"),
    samples: Annotated[int, arg(help="questions a task and setting")] = 32,
    seed: int = 0,
    json_file: Json = None,
) -> None:
    """Shows it all on the embedded model: accuracy against cache bytes, heads, conversion."""
    from kvjax.pipelines.demo import run_demo

    _write_json(json_file, run_demo(out, samples=samples, seed=seed))


def plan(
    config: Annotated[
        Positional[str], arg(help="config.json, checkpoint directory or hub id", metavar="CONFIG")
    ],
    topology: Annotated[str, arg(help="devices, such as v5e:4x4, v5p:2x2x4 or h200:8")],
    batch: Annotated[int | None, arg(help="sequences; default: one a group of devices")] = None,
    context: Annotated[int, arg(help="prompt tokens of each")] = 32_768,
    new_tokens: int = 128,
    mesh: Annotated[
        str | None, arg(help="such as data=2,tensor=8; default: heads over the KV heads' number")
    ] = None,
    policies: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(name="policy", metavar="POLICY", help="beside full and 8-bit caches; repeat for more"),
    ] = (),
    latent: Annotated[
        tuple[int, int], arg(help="latent and rotary key of the converted model; 0 0 for none")
    ] = (512, 128),
    check: Annotated[bool, arg(help="also compile a step of all layers, and compare")] = False,
    dtype: Dtype = "bfloat16",
    compile: Annotated[
        Literal["block", "step"] | None,
        arg(help="a decode step is a program for each layer, or one; default: by new tokens"),
    ] = None,
    json_file: Json = None,
) -> None:
    """What fits on devices that are not here: bytes, collectives, largest batch and context.

    Prefill and decode are compiled for the topology, without weights or devices, where its
    compiler is installed: libtpu, or jax's CUDA plugin.
    """
    from kvjax.pipelines import plan as pipeline

    compilation_cache.enable("off")  # programs for devices that are not here cannot be read back
    request = pipeline.Request(
        config,
        topology,
        context,
        new_tokens,
        batch,
        mesh,
        policies or pipeline.Request.policies,
        latent if any(latent) else None,
        dtype,
        compile,
    )
    report = pipeline.plan_capacity(request, check)
    rows, notes = report.pop("rows"), report.pop("notes")
    checked = report.pop("check", None)
    _print_facts(config, report)
    _print_rows(pipeline.readable(rows))
    if checked is not None:
        _print_facts("decode, all layers", checked)
    for note in notes:
        Console().print(note)
    _write_json(json_file, {**report, "notes": notes, "rows": rows, "check": checked})


OF_METHOD = {
    "equal_cache": ("init", "rope_site"),
    "decoupled": (
        *("kv_rank", "rope_dim", "v_head_dim", "calibration", "calibration_tokens"),
        *("calibration_length", "stats", "exportable", "mode", "recipe", "fold"),
    ),
}
"""Settings of `convert` that only one method reads."""


def _refuse_others(
    command: Callable[..., None],
    given: Mapping[str, Any],
    readers: Mapping[str, Sequence[str]],
    chosen: str,
    option: str,
) -> None:
    """Raises ValueError for settings that were changed and that nothing would read.

    Args:
        given: the command's arguments.
        readers: a choice of `option` to the settings that no other choice reads.
    """
    defaults = inspect.signature(command).parameters
    unread = [
        f"--{name.replace('_', '-')} (of {option} {choice})"
        for choice, names in readers.items()
        if choice != chosen
        for name in names
        if given[name] != defaults[name].default
    ]
    if unread:
        raise ValueError(f"{option} is {chosen}, which does not read {', '.join(unread)}")


COMMANDS = {
    "info": info,
    "convert": convert,
    "export": export,
    "score": score,
    "compress": compress,
    "generate": generate,
    "plan": plan,
    "demo": demo,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; bad input is one line on standard error and exit code 2."""
    commands = {name: local_arguments(command) for name, command in COMMANDS.items()}
    try:
        folder, argv = compilation_cache.take_flag(list(sys.argv[1:] if argv is None else argv))
        compilation_cache.enable(folder)
        tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="kvjax",
            description=f"Smaller KV caches for existing LLMs. {compilation_cache.HELP}",
            args=argv,
        )
    except (ValueError, NotImplementedError, OSError) as error:
        message = " ".join(str(error).split())
        print(f"kvjax: error: {message}", file=sys.stderr)
        sys.exit(2)


def _print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """One line a row, the first row's keys as the header; nested values stay out of the table."""
    columns = [key for key, value in rows[0].items() if not isinstance(value, dict | list)]
    table = Table(*columns)
    for row in rows:
        table.add_row(*(str(row[column]) for column in columns))
    Console().print(table)


def _print_facts(title: str, facts: dict[str, Any]) -> None:
    """One line a fact."""
    table = Table("", "", show_header=False, title=title)
    for key, value in facts.items():
        table.add_row(key, str(value))
    Console().print(table)


def _write_json(path: Path | None, result: Any) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
