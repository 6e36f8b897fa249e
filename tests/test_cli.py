"""The `kvjax` command, end to end on a tiny checkpoint; bad input is one line and exit code 2."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from llama_toy import HEAD_DIM, HEADS, KV_HEADS, LAYERS, save_llama

import kvjax
from kvjax.cli import main
from kvjax.policies.importance import HeadScores
from kvjax.tasks.words import WordVocabulary, to_transformers
from kvjax.text import added_text


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A llama checkpoint in Hugging Face layout with a tokenizer and head scores."""
    path = tmp_path_factory.mktemp("tiny") / "llama"
    vocab = WordVocabulary()
    save_llama(path, to_transformers(vocab, 256), vocab.size, 256)
    samples = np.random.default_rng(0).random((LAYERS, HEADS, 3))
    HeadScores(samples).save(path / "head_scores.json")
    return path


def run(*argv) -> None:
    main([str(a) for a in argv])


def fails(capsys, *argv, problems: int = 1) -> str:
    """The lines on standard error, one for each problem."""
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    assert stop.value.code == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == problems and said.startswith("kvjax: error: ")
    return said


def test_info(checkpoint, tmp_path):
    run("info", checkpoint, "--tensors", "model.norm.weight", "--json", tmp_path / "info.json")
    facts = json.loads((tmp_path / "info.json").read_text())
    assert facts["family"] == "llama"
    assert facts["attention"] == "GQA 4/2 × 8"
    assert facts["cache bytes a token (bfloat16)"] == LAYERS * 2 * KV_HEADS * HEAD_DIM * 2
    _model, params = kvjax.load(checkpoint, dtype="float32")
    assert facts["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert facts["tensors"][0]["mean"] == f"{float(params['final_norm'].mean()):.3g}"


def test_info_names_tensors_that_are_not_finite(checkpoint, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    model, params = kvjax.load(checkpoint, dtype="float32")
    params["layers_1"]["mlp"]["up"] = params["layers_1"]["mlp"]["up"].at[0, 0].set(np.nan)
    for name in ("config.json", "model.safetensors"):
        (broken / name).unlink()
    kvjax.save(model, params, broken, layout="hf")
    line = fails(capsys, "info", broken, "--tensors", "*")
    assert "NaN or infinite values in model.layers.1.mlp.up_proj.weight (1 of 1536)" in line
    run("info", broken, "--tensors", "model.layers.0.*")
    assert "no tensor is called lm_tail" in fails(capsys, "info", broken, "--tensors", "lm_tail")


@pytest.mark.parametrize("policy", ["full", "headkv:kv_size=12", "snapkv:kv_size=12,observed=4"])
def test_generate(checkpoint, tmp_path, capsys, policy):
    out = tmp_path / "out.json"
    text = "the question is what mary 's favorite thing is ? " * 5
    run("generate", checkpoint, text, "--max-new-tokens", 6, "--policy", policy, "--json", out)
    report = json.loads(out.read_text())
    assert report["text"].strip() in capsys.readouterr().out
    model, params = kvjax.load(checkpoint, dtype="float32")
    ids = kvjax.load_tokenizer(checkpoint)(text)["input_ids"]
    expected = kvjax.generate(model, params, [ids], max_new_tokens=6, policy=policy)
    assert report["new_tokens"] == len(expected.tokens[0])
    assert report["cache_bytes"] == expected.cache_bytes
    assert (report["cache_bytes"] < report["full_cache_bytes"]) == (policy != "full")
    entries = len(ids) * LAYERS * 2 * KV_HEADS * HEAD_DIM * 4
    assert entries <= report["full_prompt_bytes"] < 1.2 * entries  # positions and lengths too
    if policy == "full":
        assert report["prompt_bytes"] == report["full_prompt_bytes"] < report["cache_bytes"]
    else:  # 12 entries a head
        assert report["prompt_bytes"] < 0.5 * report["full_prompt_bytes"]


def test_damaged_head_scores_stop_no_policy_that_reads_none(checkpoint, tmp_path, capsys):
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint, damaged)
    (damaged / "head_scores.json").write_text("{")
    run("generate", damaged, "the question is what ?", "--max-new-tokens", 2)
    assert "bytes" in capsys.readouterr().err
    assert "head_scores.json" in fails(
        capsys, "generate", damaged, "the question is what ?", "--policy", "headkv:kv_size=12"
    )


def test_convert_then_generate(checkpoint, tmp_path):
    out = tmp_path / "converted"
    run("convert", checkpoint, out, "--init", "identity", "--json", tmp_path / "c.json")
    report = json.loads((tmp_path / "c.json").read_text())
    assert report["bytes_per_token_before"] == report["bytes_per_token_after"]
    assert report["relative_logit_change"] < 1e-5
    old, new = kvjax.load(checkpoint, dtype="float32"), kvjax.load(out, dtype="float32")
    prompt = list(range(4, 40))
    assert kvjax.generate(*old, [prompt], 8).tokens == kvjax.generate(*new, [prompt], 8).tokens
    text = kvjax.load_tokenizer(out).decode(prompt)
    assert text == kvjax.load_tokenizer(checkpoint).decode(prompt)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("convert OUT --kv-rank 8", "--method is equal_cache, which does not read --kv-rank (of"),
        ("convert OUT --fold 4 --exportable", "does not read --exportable (of --method decoupled)"),
        ("convert OUT --method decoupled --init identity", "does not read --init (of --method equ"),
        ("convert OUT --method decoupled --fold 8", "--recipe is best, which does not read --fold"),
        ("export OUT --calibration text.txt", "--norm is neutral, which does not read --calibrat"),
        ("generate hello --top-p 0.9", "--temperature is 0, which does not read --top-p (of --te"),
        ("generate hello --top-k 3", "--temperature is 0, which does not read --top-k"),
    ],
)
def test_settings_that_nothing_would_read(checkpoint, tmp_path, capsys, command, message):
    name, *rest = command.replace("OUT", str(tmp_path / "out")).split()
    assert message in fails(capsys, name, checkpoint, *rest)
    assert not (tmp_path / "out").exists()


def test_export(checkpoint, tmp_path, capsys):
    model, params = kvjax.load(checkpoint, dtype="float32")
    tokens = np.random.default_rng(0).integers(3, model.config.vocab_size, (8, 32)).astype(np.int32)
    np.save(tmp_path / "tokens.npy", tokens)
    stats = kvjax.transmla.calibrate(model, params, [tokens])
    recipe = dataclasses.replace(kvjax.transmla.BEST, centred=False, refit=False)
    sizes = {"kv_rank": 12, "rope_dim": 4, "exportable": True, "recipe": recipe}
    converted = kvjax.transmla.convert(model, params, method="decoupled", stats=stats, **sizes)
    source, out = tmp_path / "mla", tmp_path / "out"
    kvjax.save(*converted, source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint / name, source)
    run("export", source, out, "--max-shard-bytes", 20_000, "--json", tmp_path / "e.json")
    report = json.loads((tmp_path / "e.json").read_text())
    assert report["relative_logit_change"] < 1e-5
    assert report["requires"] == ["attention_bias"]
    assert report["bytes_per_token_before"] == LAYERS * (12 + 4) * 4
    assert report["bytes_per_token_after"] == LAYERS * (13 + 4) * 4
    assert report["files"] == len(list(out.glob("*.safetensors"))) > 1
    assert (report["eos"], report["notes"]) == ([2], [])
    assert report["tokenizer"] == type(kvjax.load_tokenizer(out)).__name__
    run("export", source, out, "--max-shard-bytes", 20_000, "--json", tmp_path / "again.json")
    assert capsys.readouterr().err == f"{out} is finished: nothing is left to do\n"
    assert json.loads((tmp_path / "again.json").read_text()) == report
    other = "result of other settings (max_shard_bytes 20000, now 5000000000)"
    assert other in fails(capsys, "export", source, out)
    line = fails(capsys, "export", source, tmp_path / "rms", "--norm", "rms")
    assert "needs a calibration text" in line
    text = tmp_path / "text.txt"
    text.write_text("the question is what mary 's favorite thing is ? " * 40)
    reports = []
    for calibration in (tmp_path / "tokens.npy", text):
        out = tmp_path / calibration.stem
        run(
            "export",
            source,
            out,
            "--norm",
            "rms",
            "--calibration",
            calibration,
            "--json",
            tmp_path / "e.json",
        )
        reports.append(json.loads((tmp_path / "e.json").read_text()))
    changes = [report["relative_logit_change"] for report in reports]
    assert changes[0] != changes[1] and min(changes) > 1e-3  # random weights: the norm shows
    assert [report["requires"] for report in reports] == [[], []]
    assert "grouped-query attention" in fails(capsys, "export", checkpoint, tmp_path / "gqa")
    assert not (tmp_path / "gqa").exists()


def test_compress_then_ask(checkpoint, tmp_path):
    text, kept = tmp_path / "text.txt", tmp_path / "text.kv"
    text.write_text("mary went home . " * 20)
    policy = "snapkv:kv_size=16"
    run("compress", checkpoint, text, kept, "--policy", policy, "--json", tmp_path / "c.json")
    report = json.loads((tmp_path / "c.json").read_text())
    assert report["file_bytes"] == kept.stat().st_size > report["cache_bytes"]
    settings = ("--max-new-tokens", 5, "--context", kept, "--json", tmp_path / "g.json")
    run("generate", checkpoint, "where is mary", *settings)
    answer = json.loads((tmp_path / "g.json").read_text())
    model, params = kvjax.load(checkpoint)  # the library and the commands have one default dtype
    tokenizer = kvjax.load_tokenizer(checkpoint)
    ids = tokenizer(text.read_text())["input_ids"]
    assert report["tokens"] == len(ids)
    context = kvjax.compress(model, params, ids, policy)
    question = tokenizer("where is mary", add_special_tokens=False)["input_ids"]
    expected = kvjax.generate(model, params, [question], 5, context=context)
    assert answer["new_tokens"] == len(expected.tokens[0])
    assert answer["text"] == added_text(tokenizer, question, expected.tokens[0])
    assert answer["policy"] == policy
    assert kvjax.load_context(kept, model, params).length == len(ids)


def test_compress_again_is_finished(checkpoint, tmp_path, capsys):
    text, kept, reports = tmp_path / "text.txt", tmp_path / "text.kv", []
    text.write_text("mary went home . " * 20)

    def again(*settings: Any) -> bool:
        """Whether a repetition had nothing to do."""
        run("compress", checkpoint, text, kept, *settings, "--json", tmp_path / "c.json")
        reports.append(json.loads((tmp_path / "c.json").read_text()))
        return "is finished: nothing is left to do" in capsys.readouterr().err

    assert [again(), again()] == [False, True] and reports[0] == reports[1]
    written = kept.stat().st_mtime_ns
    assert again() and kept.stat().st_mtime_ns == written
    # Another policy, another text and another model make another file.
    policy = ("--policy", "headkv:kv_size=16,scores=" + str(tmp_path / "heads.json"))
    HeadScores(np.ones((2, 4, 1))).save(tmp_path / "heads.json")
    assert [again(*policy), again(*policy)] == [False, True]
    HeadScores(np.eye(2, 4)[..., None]).save(tmp_path / "heads.json")
    assert [again(*policy), again(*policy)] == [False, True]
    text.write_text("john went home . " * 20)
    assert [again(*policy), again(*policy)] == [False, True]
    assert [again(*policy, "--dtype", "bfloat16"), again(*policy)] == [False, False]
    kept.write_bytes(kept.read_bytes()[:-5])
    assert [again(*policy), again(*policy)] == [False, True]


def test_bad_input(checkpoint, tmp_path, capsys):
    generate = ("generate", checkpoint)
    assert "is neither a directory nor a hub id" in fails(capsys, "info", "no/such/model/here")
    assert "no builtin model 'nope'" in fails(capsys, "info", "builtin:nope")
    long = fails(capsys, *generate, "mary " * 250, "--max-new-tokens", 20)
    assert "251 tokens and max_new_tokens is 20, expected at most 256" in long
    small = fails(capsys, *generate, "mary", "--policy", "snapkv:kv_size=8,observed=8")
    assert "kv_size" in small and "observed" in small and "8" in small
    assert "'quantkv' is not one of" in fails(capsys, *generate, "mary", "--policy", "quantkv")
    other = tmp_path / "other.json"
    HeadScores(np.ones((3, 5, 1))).save(other)
    shape = fails(capsys, *generate, "mary", "--policy", f"headkv:kv_size=16,scores={other}")
    assert "3" in shape and "5" in shape and "2" in shape and "4" in shape
    assert "no file at nowhere.txt" in fails(
        capsys, "compress", checkpoint, "nowhere.txt", "out.kv"
    )
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    said = fails(capsys, "compress", checkpoint, tmp_path / "latin.txt", tmp_path / "out.kv")
    assert "latin.txt is not UTF-8 text" in said
    assert "no context at" in fails(capsys, *generate, "mary", "--context", "nowhere.kv")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "is not empty" in fails(capsys, "convert", checkpoint, tmp_path / "full")


def test_empty_prompt(checkpoint, tmp_path, capsys):
    assert "the prompt is empty" in fails(capsys, "generate", checkpoint, "")


def test_missing_shard_and_truncated_file(checkpoint, tmp_path, capsys):
    model, params = kvjax.load(checkpoint, dtype="float32")
    sharded = tmp_path / "sharded"
    kvjax.save(model, params, sharded, layout="hf", max_shard_bytes=20_000)
    first, *_, last = sorted(sharded.glob("model-*.safetensors"))
    last.unlink()
    os.truncate(first, first.stat().st_size - 8)
    for command in (("info", sharded), ("generate", sharded, "mary")):
        shutil.copy(checkpoint / "tokenizer.json", sharded)
        shutil.copy(checkpoint / "tokenizer_config.json", sharded)
        line = fails(capsys, *command, problems=2)
        assert f"missing shard {last.name}" in line and f"{first.name} is truncated" in line
