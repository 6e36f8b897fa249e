"""After pretraining: export of the model, its accuracy, and a picture of the run."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp

import kvjax
import kvjax.hf
from kvjax.checks import COUNT, SEED, Range, check_finite, check_ranges
from kvjax.endings import NOTHING_YET, only_writer, say_finished
from kvjax.extras import pyplot
from kvjax.fields import Share, Size, object_problems, refuse
from kvjax.folders import made, record_made
from kvjax.hf.save import saving, write_model
from kvjax.identity import part_checksum
from kvjax.runs import whole_lines, write_json, write_picture
from kvjax.tasks import WordVocabulary, accuracy, make_examples
from kvjax.tasks.recall import TASKS
from kvjax.tasks.words import to_transformers
from kvjax.text_files import parse_object
from train.pretrain.curriculum import Curriculum
from train.pretrain.episodes import KINDS
from train.pretrain.run import Run, create_run, initial_state, load_newest

DTYPES = ("bfloat16", "float16", "float32")


def export(curriculum: Curriculum, run_dir: Path, out: Path, dtype: str = "bfloat16") -> None:
    """Writes the newest checkpoint of `run_dir`, its configuration and its tokenizer to `out`.

    The directory is whole or absent. The same call again leaves it as it is.

    Args:
        dtype: of the written weights.

    Raises:
        ValueError: an unknown dtype, no checkpoint in `run_dir` or one that holds NaN, or a model
            in `out` already.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    run = create_run(curriculum)
    state, progress = load_newest(run_dir, initial_state(run))
    params = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), state.params)
    check_finite(params, reason=f" in {dtype}; no model is written")
    request = {"step": progress.step, "weights": part_checksum(params)}
    with only_writer(out, NOTHING_YET):
        if made(out, request) is None:
            with saving(params, out, "hf") as part:
                write_model(run.model, params, part, "hf")
                write_generation_config(run, part)
                write_tokenizer(run, part)
                record_made(part, request, {})
        else:
            say_finished(out)
    print(
        f"{out}: step {progress.step}, {sum(x.size for x in jax.tree.leaves(params)):,} parameters"
    )


def write_generation_config(run: Run, out: Path) -> None:
    """Writes generation_config.json with the ids that begin a prompt and end a generation."""
    ids = {"bos_token_id": run.vocab.bos_id, "eos_token_id": run.vocab.eos_id}
    config = {**ids, "pad_token_id": run.vocab.pad_id, "do_sample": False}
    write_json(out / "generation_config.json", config)


def write_tokenizer(run: Run, out: Path) -> None:
    """Writes tokenizer.json, and a tokenizer_config.json that transformers 4 and 5 both read."""
    to_transformers(run.vocab, run.curriculum.model.max_position_embeddings).save_pretrained(
        str(out)
    )
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.pop("backend", None)  # transformers 5 adds it
    write_json(path, config)


def evaluate(
    model: str,
    out: Path | None,
    tasks: tuple[str, ...],
    lengths: tuple[int, ...],
    count: int,
    dtype: str | None = None,
    seed: int = 0,
) -> list[dict]:
    """Measures a model on prompts that training never drew.

    Args:
        model: a directory, or "builtin:needle".
        out: JSON file for the result, or None.
        count: number of prompts for each task and length.
        dtype: of the parameters; None: see `kvjax.hf.default_dtype`.

    Returns:
        One row for each task and prompt length, with the share of exact answers (1 to 12 tokens).

    Raises:
        ValueError: a count or a length below 1, a length above the model's context, an unknown
            task, or no such model.
    """
    lengths_by_name = {f"lengths[{index}]": length for index, length in enumerate(lengths)}
    values = {"count": count, "seed": seed, **lengths_by_name}
    length = Range(least=1, most=kvjax.hf.read_model(model).config.context_length, whole=True)
    ranges = {"count": COUNT, "seed": SEED, **dict.fromkeys(lengths_by_name, length)}
    check_ranges(values, ranges)
    dtype = dtype or kvjax.hf.default_dtype()
    transformer, params = kvjax.load(model, dtype=dtype)
    vocab = WordVocabulary()
    rows = []
    for task in tasks:
        for length in lengths:
            examples = make_examples(task, vocab, count, length, seed)
            row = {
                "task": task,
                "prompt_tokens": length,
                "prompts": count,
                "exact_match": accuracy(transformer, params, examples, vocab.eos_id),
                "chance": TASKS[task].chance,
                "dtype": dtype,
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    if out is not None:
        command = shlex.join(["python", "-m", "train", *sys.argv[1:]])
        result = {"model": model, "seed": seed, "command": command, "rows": rows}
        write_json(out, result)
    return rows


LINE = {"tokens": Size, "accuracy": dict[str, Share]}
"""Fields of a line of the log that are drawn."""


def plot_curve(curriculum: Curriculum, metrics: Path, out: Path) -> None:
    """Draws the accuracy of each kind of question over the tokens seen, with stages, into a PNG.

    Raises:
        ValueError: the log is empty.
    """
    plt = pyplot()
    lines = [parse_object(x, f"{metrics}, line {i}") for i, x in enumerate(whole_lines(metrics), 1)]
    stage = Annotated[int, Range(least=0, most=len(curriculum.stages) - 1, whole=True)]
    for number, line in enumerate(lines, 1):
        refuse(object_problems(line, LINE | {"stage": stage}), f"{metrics}, line {number}")
    if not lines:
        raise ValueError(f"{metrics} is empty")
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    # One curve for each kind; a kind is missing from lines of stages that don't ask it.
    for kind in KINDS:
        points = [(x["tokens"] / 1e6, x["accuracy"][kind]) for x in lines if kind in x["accuracy"]]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", label=kind)
    # Mark where each stage begins, with its sequence length.
    for before, line in zip([None, *lines], lines, strict=False):
        if before is None or before["stage"] != line["stage"]:
            x = (before["tokens"] if before else 0) / 1e6
            axes.axvline(x, color="0.8", zorder=0)
            length = curriculum.stages[line["stage"]].episodes.length
            axes.text(x, 1.02, f" {length}", color="0.4", fontsize=7)
    axes.set(
        xlabel="tokens seen, millions",
        ylabel="whole answers right, training stage",
        ylim=(0, 1.08),
        title="Pretraining; a line starts a stage, the number is its sequence length",
    )
    axes.legend(loc="lower right")
    write_picture(out, figure, dpi=110)
