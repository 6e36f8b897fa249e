"""Conversions from and to disk: what memory gives bit for bit, and on after they were stopped."""

import functools
import json
import shutil
import weakref

import jax
import numpy as np
import pytest
from tiny_checkpoints import CASES, COMMON
from toys import random_params

import kvjax
from kvjax.commands import convert
from kvjax.hf import config_from_hf, native, open_params
from kvjax.hf.source import is_native
from kvjax.hf.weights import LazyParams
from kvjax.nn import Transformer
from kvjax.transmla import calibrate

LAYERS, VOCAB = 3, COMMON["vocab_size"]
SIZES = {"kv_rank": 12, "rope_dim": 4}
METHODS = ("equal_cache", "decoupled")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint in several shards, and token ids to calibrate on."""
    folder = tmp_path_factory.mktemp("source")
    raw = {**COMMON, **CASES["llama_biases"], "num_hidden_layers": LAYERS}
    model = Transformer(config_from_hf(raw))
    shards = {"layout": "hf", "max_shard_bytes": 20_000}
    kvjax.save(model, random_params(model), folder / "model", **shards)
    assert len(list((folder / "model").glob("*.safetensors"))) > LAYERS
    # Two batches of eight to calibrate on and two held-out texts: batches of one shape.
    ids = np.random.default_rng(3).integers(0, VOCAB, (18, 16)).astype(np.int32)
    np.save(folder / "tokens.npy", ids)
    return folder


def run(folder, out, method, **settings):
    """The conversion as `kvjax convert` asks for it."""
    if method == "equal_cache":
        wanted = convert.EqualCacheSettings(**settings)
        return convert.convert_to_equal_cache(str(folder / "model"), out, wanted, "float32")
    wanted = convert.DecoupledSettings(calibration=folder / "tokens.npy", **{**SIZES, **settings})
    return convert.convert_to_decoupled(str(folder / "model"), out, wanted, "float32")


@functools.cache
def uninterrupted(folder, method):
    """Report and parameters of a run that nothing stopped."""
    out = folder / method
    return run(folder, out, method), *kvjax.load(out, dtype="float32")


def assert_same(folder, out, method, report):
    """Bits, configuration and report of the run that nothing stopped; nothing else is left."""
    want_report, want_model, want = uninterrupted(folder, method)
    model, params = kvjax.load(out, dtype="float32")
    assert model.config.layers == want_model.config.layers
    jax.tree.map(np.testing.assert_array_equal, params, want)
    effort = {"seconds", "peak_memory_bytes"}
    assert {k: v for k, v in report.items() if k not in effort} == {
        k: v for k, v in want_report.items() if k not in effort
    }
    names = ["kvjax.json", "kvjax_made.json", "params"]
    assert sorted(path.name for path in out.iterdir()) == names


@pytest.mark.parametrize("method", METHODS)
def test_disk_to_disk_is_what_memory_gives_bit_for_bit(source, method):
    _, model, params = uninterrupted(source, method)
    own, weights = kvjax.load(source / "model", dtype="float32")
    options = {}
    if method == "decoupled":
        ids = np.load(source / "tokens.npy")
        fit = ids[np.arange(len(ids)) % 8 != 7]
        batches = [fit[i : i + 8] for i in range(0, len(fit), 8)]
        held = ids[np.arange(len(ids)) % 8 == 7]
        options = {"stats": calibrate(own, weights, batches), "held_out": held, **SIZES}
    want = kvjax.transmla.convert(own, weights, method=method, **options)
    assert model.config.layers == want[0].config.layers
    jax.tree.map(np.testing.assert_array_equal, params, want[1])


def test_kept_moments_are_those_of_a_layer_at_a_time(source, tmp_path):
    out = tmp_path / "out"
    report = run(source, out, "decoupled", stats=tmp_path / "moments.npz")
    assert report.pop("seconds_calibration") >= 0
    assert_same(source, out, "decoupled", report)


def stop_after(count, monkeypatch):
    """Writing the part after `count` others ends as if the process had been killed within it."""
    parts, write = [], native.write_part

    def stopped(directory, name, part):
        if len(parts) == count:
            half = directory / "params" / f"{name}.orbax-checkpoint-tmp"
            half.mkdir(parents=True)
            (half / "d").touch()
            raise KeyboardInterrupt
        write(directory, name, part)
        parts.append(name)

    monkeypatch.setattr(native, "write_part", stopped)
    return parts


@pytest.mark.parametrize("count", [0, 1, LAYERS, LAYERS + 2])
@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_conversion_goes_on(source, tmp_path, method, count):
    out = tmp_path / "out"
    # With fits, the closed form of a layer is written before the layer.
    parts = min(count, LAYERS) * (2 if method == "decoupled" else 1) + max(count - LAYERS, 0)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(parts, patch)
        with pytest.raises(KeyboardInterrupt):
            run(source, out, method)
    assert not is_native(out)
    written = []
    with pytest.MonkeyPatch.context() as patch:
        write = native.write_part
        patch.setattr(native, "write_part", lambda *a: (written.append(a[1]), write(*a)))
        report = run(source, out, method)
    top = {"embedding", "final_norm", "lm_head"}
    assert set(written) == {f"layers_{i}" for i in range(min(count, LAYERS), LAYERS)} | top
    assert_same(source, out, method, report)


def test_a_conversion_that_goes_on_keeps_its_division_of_the_cache(source, tmp_path, monkeypatch):
    out, whole = tmp_path / "out", tmp_path / "whole"
    share = {"kv_rank": None, "rope_dim": None, "cache": 0.5}
    want = run(source, whole, "decoupled", **share)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(KeyboardInterrupt):
            run(source, out, "decoupled", **share)
    # The layers that are finished say it: the text is not read for it again.
    monkeypatch.setattr(convert, "layer_moments", lambda *args: iter(()))
    report = run(source, out, "decoupled", **share)
    assert (report["kv_rank"], report["rope_dim"]) == (want["kv_rank"], want["rope_dim"])
    jax.tree.map(
        np.testing.assert_array_equal,
        kvjax.load(out, dtype="float32")[1],
        kvjax.load(whole, dtype="float32")[1],
    )


def test_a_layer_that_is_not_counted_is_written_again(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        parts = stop_after(2, patch)
        with pytest.raises(KeyboardInterrupt):
            run(source, out, "equal_cache")
    assert parts == ["layers_0", "layers_1"]
    native.write_part(out, "layers_2", {"stale": np.zeros(3, np.float32)})
    (out / "unfinished.safetensors.0123abcd.part").write_bytes(b"half of a file")
    assert_same(source, out, "equal_cache", run(source, out, "equal_cache"))


def test_other_settings_are_refused(source, tmp_path):
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        stop_after(1, patch)
        with pytest.raises(KeyboardInterrupt):
            run(source, out, "decoupled")
    before = sorted(out.rglob("*"))
    named = r"unfinished conversion with other settings \(kv_rank 12, now 10\): repeat that command"
    with pytest.raises(ValueError, match=named):
        run(source, out, "decoupled", kv_rank=10)
    with pytest.raises(ValueError, match="method decoupled, now equal_cache"):
        run(source, out, "equal_cache")
    tokens = source / "other.npy"
    np.save(tokens, np.load(source / "tokens.npy")[::-1])
    wanted = convert.DecoupledSettings(calibration=tokens, **SIZES)
    with pytest.raises(ValueError, match=r"text \w+, now \w+"):
        convert.convert_to_decoupled(str(source / "model"), out, wanted, "float32")
    model, params = kvjax.load(source / "model", dtype="float32")
    norm = params["layers_1"]["attn_pre_norm"].at[0].add(1e-5)
    tuned = params | {"layers_1": params["layers_1"] | {"attn_pre_norm": norm}}
    kvjax.save(model, tuned, tmp_path / "model")
    (tmp_path / "tokens.npy").write_bytes((source / "tokens.npy").read_bytes())
    with pytest.raises(ValueError, match=r"weights \w+, now \w+"):
        run(tmp_path, out, "decoupled")
    assert sorted(out.rglob("*")) == before
    assert_same(source, out, "decoupled", run(source, out, "decoupled"))


@pytest.mark.parametrize("late", [False, True])
def test_a_finished_conversion_says_so(source, tmp_path, monkeypatch, capsys, late):
    report, *_ = uninterrupted(source, "equal_cache")
    out = tmp_path / "out"
    shutil.copytree(source / "equal_cache", out)
    if late:  # killed between the configuration and the end
        (out / "unfinished.safetensors").touch()
        (out / "other").mkdir()
    monkeypatch.setattr(native, "write_part", lambda *_: pytest.fail("it is written again"))
    again = run(source, out, "equal_cache")
    assert capsys.readouterr().err == f"{out} is finished: nothing is left to do\n"
    assert_same(source, out, "equal_cache", again)
    assert again == json.loads(json.dumps(report))
    with pytest.raises(ValueError, match=r"result of other settings \(rope_site after_up, now"):
        run(source, out, "equal_cache", rope_site="before_up")


def test_only_an_unfinished_conversion_is_gone_on_with(source, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").touch()
    with pytest.raises(ValueError, match="is not empty, expected a new directory"):
        run(source, tmp_path / "other", "equal_cache")
    (tmp_path / "unfinished.safetensors").write_bytes(b"something else")
    with pytest.raises(
        ValueError, match=r"unfinished\.safetensors does not belong to a conversion"
    ):
        run(source, tmp_path, "equal_cache")


@pytest.mark.parametrize("exists", [False, True])
def test_a_refusal_at_a_later_layer_leaves_nothing(tmp_path, exists):
    # The first layer has no RoPE and takes any init, the second refuses this one.
    case = {**COMMON, **CASES["smollm3"], "no_rope_layers": [0, 1], "tie_word_embeddings": True}
    model = Transformer(config_from_hf(case))
    kvjax.save(model, random_params(model), tmp_path / "model", layout="hf")
    out = tmp_path / "out"
    if exists:
        out.mkdir()
    with pytest.raises(ValueError, match="layer 1: this init's up-projection does not commute"):
        run(tmp_path, out, "equal_cache", rope_site="before_up")
    assert not any(out.iterdir()) if exists else not out.exists()


@pytest.mark.parametrize("method", METHODS)
def test_one_layer_is_alive_at_a_time(source, tmp_path, monkeypatch, method):
    alive: list[weakref.ref] = []
    most = {"layers": 0, "vocabulary": 0}

    def counted(path, dtype, mesh):
        params = open_params(path, dtype, mesh)

        def read(name):
            part = params[name]
            kind = "layers" if name.startswith("layers_") else "vocabulary"
            leaf = part["mlp"]["gate"] if kind == "layers" else part
            if name != "final_norm":
                alive.append(weakref.ref(leaf))
            most[kind] = max(most[kind], sum(ref() is not None for ref in alive))
            return part

        return LazyParams(params, read)

    monkeypatch.setattr(convert, "open_params", counted)
    run(source, tmp_path / "out", method)
    assert most == {"layers": 1, "vocabulary": 1}
    assert json.loads((tmp_path / "out" / "kvjax.json").read_text())["version"] == native.VERSION
