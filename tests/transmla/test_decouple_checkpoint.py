"""`kvjax convert --method decoupled`: from disk to disk, a layer at a time."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from calibrated_toys import build, forward

import kvjax
from kvjax.cli import main
from kvjax.commands import held_out
from kvjax.hf import open_params
from kvjax.transmla import BEST, Stats, calibrate, convert


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    model, params, _, _, _ = build("llama")
    folder = tmp_path_factory.mktemp("source")
    kvjax.save(model, params, folder / "model", layout="hf")
    ids = np.random.default_rng(3).integers(0, model.config.vocab_size, (24, 16)).astype(np.int32)
    np.save(folder / "tokens.npy", ids)
    return folder, ids


def run(folder, out, *options):
    main(
        [
            *("convert", str(folder / "model"), str(out), "--method", "decoupled"),
            *("--calibration", str(folder / "tokens.npy"), "--json", str(out) + ".json"),
            *options,
        ]
    )
    return json.loads((out.parent / f"{out.name}.json").read_text())


def test_disk_to_disk_is_what_memory_gives(source, tmp_path):
    folder, ids = source
    model, params, _, tokens, _ = build("llama")
    stats_file = tmp_path / "moments.npz"
    report = run(
        folder, tmp_path / "out", "--kv-rank", "12", "--rope-dim", "4", "--stats", str(stats_file)
    )
    fit = ids[np.arange(24) % 8 != 7]
    stats = calibrate(model, params, [fit[i : i + 8] for i in range(0, len(fit), 8)])
    sizes = {"kv_rank": 12, "rope_dim": 4, "held_out": ids[7::8]}
    want = convert(model, params, method="decoupled", stats=stats, **sizes)
    loaded = kvjax.load(tmp_path / "out", dtype="float32")
    assert loaded[0].config == want[0].config
    np.testing.assert_allclose(
        forward(*loaded, tokens), forward(*want, tokens), atol=1e-4, rtol=1e-3
    )
    np.testing.assert_array_equal(Stats.load(stats_file).tokens, fit)
    assert report["bytes_per_token_after"] * 2 == report["bytes_per_token_before"]
    assert report["cache"] == "50.0%" and report["held_out_tokens"] == 3 * 16
    names = ("original", "partial_rope", "low_rank", "final")
    assert all(np.isfinite(report[f"perplexity_{name}"]) for name in names)
    want_original = np.exp(
        -np.mean(
            np.take_along_axis(
                np.asarray(jax.nn.log_softmax(forward(model, params, ids[7::8])[:, :-1])),
                ids[7::8][:, 1:, None],
                axis=-1,
            )
        )
    )
    assert report["perplexity_original"] == pytest.approx(want_original, rel=1e-3)


@pytest.mark.parametrize("options", [(), ("--stats",)])
def test_the_division_of_the_cache_is_the_one_that_memory_chooses(source, tmp_path, options):
    folder, ids = source
    options = [*options, *[str(tmp_path / "moments.npz")] * len(options)]
    report = run(folder, tmp_path / "out", "--cache", "0.75", *options)
    model, params, _, _, _ = build("llama")
    fit = ids[np.arange(24) % 8 != 7]
    stats = calibrate(model, params, [fit[i : i + 8] for i in range(0, len(fit), 8)])
    recipe = dataclasses.replace(BEST, refit=False)
    want = convert(model, params, "decoupled", stats=stats, cache=0.75, recipe=recipe)[0]
    assert kvjax.load(tmp_path / "out", dtype="float32")[0].config == want.config
    first = want.config.layers[0].attention
    assert (report["kv_rank"], report["rope_dim"]) == first.cached_widths


def test_a_conversion_without_fits_is_the_closed_form(source, tmp_path, monkeypatch):
    folder, ids = source
    monkeypatch.setattr(held_out, "best_depth", lambda losses: 0)
    report = run(folder, tmp_path / "out", "--kv-rank", "12", "--rope-dim", "4")
    assert report["fitted_layers"] == 0
    assert report["perplexity_final"] == report["perplexity_low_rank"]
    model, params, _, tokens, _ = build("llama")
    fit = ids[np.arange(24) % 8 != 7]
    closed = {"kv_rank": 12, "rope_dim": 4, "recipe": dataclasses.replace(BEST, refit=False)}
    want = convert(model, params, "decoupled", calibration=fit, **closed)
    loaded = kvjax.load(tmp_path / "out", dtype="float32")
    assert loaded[0].config == want[0].config
    np.testing.assert_allclose(
        forward(*loaded, tokens), forward(*want, tokens), atol=1e-4, rtol=1e-3
    )


def test_the_published_recipe_with_the_best_fold(source, tmp_path):
    report = run(
        source[0], tmp_path / "out", "--kv-rank", "12", "--rope-dim", "4", "--recipe", "published",
        "--fold", "0",
    )  # fmt: skip
    assert report["recipe"] in ("published, FreqFold 2", "published, FreqFold 4")
    # Nothing is fitted: the low rank is the last step.
    assert report["perplexity_final"] == report["perplexity_low_rank"]


def test_layers_are_read_when_asked_for(source):
    folder, _ = source
    _, params, _, _, _ = build("llama")
    lazy = open_params(folder / "model", "float32")
    assert set(lazy) == set(params) and len(lazy) == len(params)
    jax.tree.map(np.testing.assert_array_equal, lazy["layers_1"], params["layers_1"])
    assert lazy["layers_1"]["mlp"]["up"] is not lazy["layers_1"]["mlp"]["up"]
    with pytest.raises(KeyError):
        lazy["layers_2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--kv-rank", "40"), "kv_rank is 40, expected 1 to 28"),
        (("--kv-rank", "8", "--rope-dim", "18"), "rope_dim is 18, expected an even number"),
        (("--kv-rank", "8", "--recipe", "magic"), "expected one of best, unbiased, published"),
        (("--kv-rank", "8", "--calibration", "no.txt"), "no calibration file no.txt"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(source, tmp_path, capsys, options, message):
    sizes = () if "--rope-dim" in options else ("--rope-dim", "4")
    with pytest.raises(SystemExit) as exit:
        run(source[0], tmp_path / "out", *sizes, *options)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_calibration_is_needed(source, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["convert", str(source[0] / "model"), str(tmp_path / "o"), "--method", "decoupled"])
    assert "needs --calibration FILE" in capsys.readouterr().err
