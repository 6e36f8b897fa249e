"""Conversions of NaN: one line names the tensor, and nothing is left that looks finished."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calibrated_toys import build

import kvjax
from kvjax.cli import main
from kvjax.commands.convert import DecoupledSettings
from kvjax.commands.text import token_rows
from kvjax.hf import latent_rms
from kvjax.transmla import BEST, Stats, calibrate, convert, published
from kvjax.transmla.allocation import allocate_sizes, choose_fold
from kvjax.transmla.distill import distill

NAN = float("nan")
SIZES = {"kv_rank": 12, "rope_dim": 4}
PLACES = ["layers_1/attn/k", "layers_0/attn/o", "layers_0/mlp/up", "embedding", "final_norm"]


def broken(params, place, value=NAN):
    """The parameters with one number replaced."""
    *parts, last = place.split("/")
    new = jax.tree.map(lambda leaf: leaf, params)  # new dicts
    inner = new
    for part in parts:
        inner = inner[part]
    inner[last] = inner[last].at[(0,) * inner[last].ndim].set(value)
    return new


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints that are broken in one place each, and calibration ids."""
    out = tmp_path_factory.mktemp("broken")
    model, params, stats, *_ = build("llama")
    for place in PLACES:
        name = out / place.replace("/", "-")
        kvjax.save(model, broken(params, place), name, layout="hf")
    kvjax.save(model, params, out / "whole", layout="hf")
    np.save(out / "ids.npy", stats.tokens)
    return out


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("value", [NAN, np.inf])
@pytest.mark.parametrize("method", ["equal_cache", "decoupled"])
def test_a_conversion_in_memory_names_the_weight(place, value, method):
    model, params, stats, *_ = build("llama")
    options = {"stats": stats, **SIZES} if method == "decoupled" else {}
    with pytest.raises(ValueError, match=f"^{place} has NaN or infinite values, expected finite"):
        convert(model, broken(params, place, value), method, **options)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("options", ["", "--method decoupled --kv-rank 12 --rope-dim 4"])
def test_a_conversion_on_disk_names_the_weight_and_leaves_nothing(
    folder, tmp_path, capsys, place, options
):
    out = tmp_path / "out"
    source = str(folder / place.replace("/", "-"))
    command = ["convert", source, str(out), *options.split()]
    command += ["--calibration", str(folder / "ids.npy")] * bool(options)
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 2 and not out.exists()
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"kvjax: error: {place} has NaN or infinite values")


def test_an_export_names_the_weight(tmp_path):
    model, params, stats, *_ = build("llama")
    sizes = {"kv_rank": 12, "rope_dim": 4, "exportable": True}
    new_model, new = convert(model, params, "decoupled", stats=stats, **sizes)
    kvjax.save(new_model, broken(new, "layers_1/attn/v_up"), tmp_path / "mla")
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path / "mla"), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    from kvjax.commands.checkpoints import export_checkpoint

    with pytest.raises(ValueError, match=r"^layers_1/attn/v_up has NaN"):
        export_checkpoint(str(tmp_path / "mla"), tmp_path / "out", "neutral", None, 99, "float32")
    with pytest.raises(ValueError, match="max_shard_bytes is 0"):
        export_checkpoint(str(tmp_path / "mla"), tmp_path / "o", "neutral", None, 99, "float32", 0)


def test_an_export_in_memory_names_the_weight(tmp_path):
    model, params, stats, *_ = build("llama")
    sizes = {"kv_rank": 12, "rope_dim": 4, "exportable": True}
    new_model, new = convert(model, params, "decoupled", stats=stats, **sizes)
    bad = broken(new, "layers_1/attn/kv_a")
    with pytest.raises(ValueError, match=r"^layers_1/attn/kv_a has NaN .* layout in float32"):
        kvjax.save(new_model, bad, tmp_path / "out", layout="deepseek_v3")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"^layer 1: latents has NaN or infinite values"):
        latent_rms(new_model, bad, [stats.tokens])
    with pytest.raises(ValueError, match="calibration has token"):
        latent_rms(new_model, new, [stats.tokens + model.config.vocab_size])


def test_factors_that_overflow_the_dtype_are_refused():
    model, params, *_ = build("llama")
    large = broken(params, "layers_1/attn/k", 6e4)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), large)

    def doubled(weight, repeats, rope):
        from kvjax.transmla.inits import identity

        factors = identity(weight, repeats, rope)
        return dataclasses.replace(factors, down=factors.down * 2, up=factors.up / 2)

    with pytest.raises(ValueError, match=r"^layers_1/attn/k_down has NaN .*after the conversion"):
        convert(model, half, init=doubled)


def test_activations_that_overflow_are_named_by_their_layer():
    """All weights are finite in float16; the values of layer 0 are not."""
    model, params, stats, *_ = build("llama")
    large = jax.tree.map(lambda leaf: leaf, params)
    large["layers_0"]["attn"]["v"] = large["layers_0"]["attn"]["v"] * 6e4
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), large)
    with pytest.raises(ValueError, match=r"layer 0: \w+_mean is NaN or infinite.*float16 ends"):
        calibrate(model, half, [stats.tokens])


@pytest.mark.parametrize("place", PLACES[:-1])
def test_a_calibration_names_the_weight(place):
    model, params, stats, *_ = build("llama")
    late = place in ("layers_0/attn/o", "layers_0/mlp/up")
    with pytest.raises(ValueError, match=f"^{place} has NaN or infinite values"):
        calibrate(model, broken(params, place), [np.zeros_like(stats.tokens)] * (1 + late))


def test_moments_that_hold_nan_are_refused(tmp_path):
    model, params, stats, *_ = build("llama")
    bad = dataclasses.replace(stats.layers[1], q_second=stats.layers[1].q_second * NAN)
    held = dataclasses.replace(stats, layers=(stats.layers[0], bad))
    with pytest.raises(ValueError, match=r"^stats: layer 1: q_second has NaN"):
        convert(model, params, "decoupled", stats=held, **SIZES)
    held.save(tmp_path / "moments.npz")
    with pytest.raises(ValueError, match=r"moments\.npz holds no calibration: layer 1: q_second"):
        Stats.load(tmp_path / "moments.npz")
    for content in (b"", b"PK\x03\x04", (tmp_path / "moments.npz").read_bytes()[:900]):
        (tmp_path / "cut.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"cut\.npz holds no calibration"):
            Stats.load(tmp_path / "cut.npz")


def test_stats_with_tokens_of_another_model():
    model, params, stats, *_ = build("llama")
    other = dataclasses.replace(stats, tokens=stats.tokens + model.config.vocab_size)
    with pytest.raises(ValueError, match="stats has token"):
        convert(model, params, "decoupled", stats=other, **SIZES)


@pytest.mark.parametrize("recipe", [BEST, published(4)])
def test_a_layer_of_dead_heads_is_converted(recipe):
    """Keys and values of nothing but zeros: no ratio of their norms, and no LinAlgError."""
    model, params, stats, *_ = build("llama")
    dead = jax.tree.map(lambda leaf: leaf, params)
    for name in "kv":
        dead["layers_0"]["attn"][name] = jnp.zeros_like(dead["layers_0"]["attn"][name])
    stats = calibrate(model, dead, [stats.tokens])
    _, new = convert(model, dead, "decoupled", stats=stats, recipe=recipe, **SIZES)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kv_rank": True}, "kv_rank is True, expected a whole number"),
        ({"rope_dim": [4, True]}, r"rope_dim\[1\] is True"),
        ({"kv_rank": 0}, "kv_rank is 0, expected 1 to"),
        ({"rope_dim": -4}, "rope_dim is -4"),
        ({"v_head_dim": 0}, "v_head_dim is 0, expected a whole number from 1"),
        ({"v_head_dim": True}, "v_head_dim is True"),
        ({"q_rank": True}, "q_rank is True"),
    ],
)
def test_sizes(changes, message):
    model, params, stats, *_ = build("llama")
    with pytest.raises(ValueError, match=message):
        convert(model, params, "decoupled", stats=stats, **{**SIZES, **changes})


def test_numbers_of_other_steps():
    model, params, stats, *_ = build("llama")
    held = stats.tokens[:2]
    with pytest.raises(ValueError, match="fold is -1, expected a whole number from 0"):
        published(-1)
    for step, rounds, message in ((0, 1, "step is 0"), (2, -1, "rounds is -1")):
        with pytest.raises(ValueError, match=message):
            allocate_sizes(model, params, stats, held, **SIZES, step=step, rounds=rounds)
    with pytest.raises(ValueError, match="tokens has token"):
        choose_fold(model, params, stats, held - 10_000, **SIZES)
    converted = convert(model, params, "decoupled", stats=stats, **SIZES)
    for name, value in (("learning_rate", NAN), ("steps", -1), ("batch_size", 0), ("seed", -1)):
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            distill(model, params, *converted, stats, **{name: value})
    with pytest.raises(ValueError, match="after 3 steps of distillation"):
        distill(model, params, *converted, stats, steps=3, learning_rate=1e38)


def test_all_numbers_of_a_conversion_are_one_error(tmp_path):
    with pytest.raises(ValueError) as error:
        counts = {"calibration_tokens": 0, "calibration_length": 1}
        DecoupledSettings(0.0, 0, -2, tmp_path, v_head_dim=0, fold=-1, **counts)
    named = [part.split(" is ")[0] for part in str(error.value).split("; ")]
    assert named == ["cache", "kv_rank", "rope_dim", "v_head_dim", "fold", *counts]


@pytest.mark.parametrize(
    "ids, message",
    [
        (np.ones((2, 8)), r"holds float64 \(2, 8\), expected integers"),
        (np.ones((2, 8), bool), r"holds bool \(2, 8\), expected integers"),
        (np.ones(8, np.int32), r"holds int32 \(8,\), expected integers \[S, T\]"),
        (np.ones((0, 8), np.int32), "is empty, expected at least one token"),
        (np.ones((2, 0), np.int32), "is empty, expected at least one token"),
        (np.full((2, 8), -1), "has token -1, expected ids of 0 to"),
        (np.full((2, 8), 10**6), "has token 1000000"),
        (np.full((2, 8), 2**32), "has token 4294967296"),
        (np.full((2, 8), 2**63, np.uint64), "has token 9223372036854775808"),
        (np.ones((2, 97), np.int32), "sequences of 97 tokens, expected 2 to 96, the model's"),
        (np.ones((2, 1), np.int32), "sequences of 1 tokens, expected 2 to 96"),
        (np.array([[{}]]), r"is not an \.npy file of token ids"),
    ],
)
def test_calibration_files(folder, tmp_path, ids, message):
    path = tmp_path / "ids.npy"
    np.save(path, ids)
    with pytest.raises(ValueError, match=message):
        token_rows(str(folder / "whole"), path, 1000, 8)


def test_calibration_files_of_other_kinds(folder, tmp_path, monkeypatch):
    source, path = str(folder / "whole"), tmp_path / "ids.npy"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"ids\.npy is not an \.npy file of token ids"):
        token_rows(source, path, 1000, 8)
    text = tmp_path / "text.txt"
    text.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match=r"text\.txt is not UTF-8 text"):
        token_rows(source, text, 1000, 8)
    text.write_text("a b c d")
    from kvjax.commands import text as command

    other = SimpleNamespace(encode=lambda text, **_: [5, 10**6, 7, 8])
    monkeypatch.setattr(command, "load_tokenizer", lambda source: other)
    with pytest.raises(ValueError, match="has token 1000000, expected ids of 0 to"):
        token_rows(source, text, 1000, 4)


def test_float_batches_are_not_cut_to_integers():
    model, params, stats, *_ = build("llama")
    with pytest.raises(
        ValueError, match=r"calibration: got \S+ among the token ids, expected an array"
    ):
        calibrate(model, params, [stats.tokens + 0.7])
    with pytest.raises(ValueError, match="calibration: got lists of different lengths"):
        calibrate(model, params, [[[1, 2], [3]]])


def test_a_report_is_numbers(folder, tmp_path):
    out, report = tmp_path / "out", tmp_path / "report.json"
    main(["convert", str(folder / "whole"), str(out), "--json", str(report)])
    facts = json.loads(report.read_text(), parse_constant=pytest.fail)
    assert 0 <= facts["relative_logit_change"] < 1e-4
