"""Perplexity: a full prefix is no different from none, windows overlap, files are read whole."""

import gzip
import json
import math

import eval_toys as toys
import jax
import numpy as np
import pytest
from tokenizer_toys import sentencepiece
from toys import forward

import kvjax
from eval.__main__ import main
from eval.likelihood import dense_losses, losses_after_prefix
from eval.perplexity import chunks, perplexity_of, read_ids
from kvjax import scoring
from kvjax.cache import without_last
from kvjax.policies.named import resolve
from kvjax.tasks import perplexity

IDS = np.random.default_rng(0).integers(4, toys.VOCAB.size, 250).astype(np.int32)
LENGTH, PREFIX = 60, 22


def flat(batches):
    return [row for batch in batches for row in batch]


def by_hand(tokens):
    """Losses of all tokens but the first, from one forward of one row."""
    loaded = toys.loaded()
    logits = forward(loaded.model, loaded.params, tokens[None])[0, :-1]
    found = np.asarray(jax.nn.log_softmax(logits), np.float64)
    return -np.take_along_axis(found, tokens[1:, None], axis=1)[:, 0]


def test_dense_is_the_library_s():
    loaded, rows = toys.loaded(), chunks(IDS, LENGTH, LENGTH)
    found = flat(dense_losses(loaded.model, loaded.params, rows, LENGTH, batch_size=3))
    assert rows.shape == (4, LENGTH) and len(found) == 4
    for row, got in zip(rows, found, strict=True):
        np.testing.assert_allclose(got, by_hand(row), rtol=1e-5)
    expected = perplexity(loaded.model, loaded.params, [rows])
    assert perplexity_of(found)["score"] == pytest.approx(expected, rel=1e-6)
    assert perplexity_of(found)["items"] == 4 * (LENGTH - 1)


def test_a_sliding_window_scores_every_token_once():
    loaded, stride = toys.loaded(), 25
    rows = chunks(IDS, LENGTH, stride)
    found = np.concatenate(
        flat(dense_losses(loaded.model, loaded.params, rows, stride, batch_size=3))
    )
    reached = (len(rows) - 1) * stride + LENGTH
    assert reached > len(IDS) - stride and len(found) == reached - 1
    for token in (1, 40, LENGTH, LENGTH + 3, reached - 1):
        row = max(0, -(-(token + 1 - LENGTH) // stride))
        expected = by_hand(IDS[row * stride : row * stride + LENGTH])[token - row * stride - 1]
        assert found[token - 1] == pytest.approx(expected, rel=1e-5)


def test_a_full_prefix_gives_what_no_prefix_gives(monkeypatch):
    monkeypatch.setattr(scoring, "PIECE", 16)  # several pieces, the last one not full
    loaded, rows = toys.loaded(), chunks(IDS, LENGTH, LENGTH)

    names = ("full", "snapkv:kv_size=10,observed=4")
    policies = [resolve(name, loaded.model.config, None) for name in names]
    full, small = [], []
    for number, part in losses_after_prefix(loaded.model, loaded.params, rows, PREFIX, policies, 3):
        (full, small)[number].extend(part)
    assert len(full) == len(small) == len(rows)
    for row, got in zip(rows, full, strict=True):
        np.testing.assert_allclose(got, by_hand(row)[PREFIX - 1 :], rtol=1e-4, atol=1e-5)
    # The token right after the prefix sees the compressed cache too, which takes the last token of
    # the prefix again.
    lengths, ids = np.full(len(rows), PREFIX, np.int32), rows[:, :PREFIX]
    _, cache = kvjax.prefill(loaded.model, loaded.params, ids, lengths, policies[1])
    cache = without_last(cache, [True] * len(rows))
    logits, _ = kvjax.decode_step(loaded.model, loaded.params, cache, rows[:, PREFIX - 1])
    found = -np.asarray(jax.nn.log_softmax(logits))[np.arange(len(rows)), rows[:, PREFIX]]
    np.testing.assert_allclose([r[0] for r in small], found, rtol=1e-4)
    assert not np.allclose([r[0] for r in small], [r[0] for r in full], rtol=1e-3)
    assert not np.allclose(np.concatenate(small), np.concatenate(full), rtol=1e-3)


def test_the_standard_error_is_over_chunks():
    rows = [np.array([1.0, 2.0]), np.array([3.0, 5.0]), np.array([2.0, 2.0])]
    got = perplexity_of(rows)
    assert got["score"] == pytest.approx(math.exp(2.5))
    expected = math.exp(2.5) * np.std([1.5, 4.0, 2.0], ddof=1) / math.sqrt(3)
    assert got["standard_error"] == pytest.approx(expected)
    assert perplexity_of(rows[:1])["standard_error"] is None


def test_documents_are_joined_with_blank_lines(tmp_path):
    class Bytes:
        def encode(self, text, **settings):
            return list(text.encode())

    tokenizer = Bytes()
    (tmp_path / "a.txt").write_text("one")
    rows = [json.dumps({"text": text}) for text in ("two", "three")]
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    names = [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl.gz")]
    assert bytes(read_ids(names, tokenizer).tolist()) == b"one\n\ntwo\n\nthree"
    texts = (tmp_path / "e.txt"), (tmp_path / "f.txt")
    for path, text in zip(texts, ("the return", "<s>the return"), strict=True):
        path.write_text(text)
        ids = read_ids([str(path)], sentencepiece(end=True)).tolist()
        assert ids[0] == 1 and ids.count(1) == 1 and ids[-1] != 2
    (tmp_path / "c.jsonl").write_text('{"text": "four"}\n{"text": 5}\n')
    (tmp_path / "i.npy").write_text("one")
    np.save(tmp_path / "j.npy", np.ones(3))
    for name, message in (
        (tmp_path / "c.jsonl", "line 2.*expected text"),
        (tmp_path / "d.txt", "no file at .*d.txt"),
        (tmp_path / "g.npy", "no file at .*g.npy"),
        (tmp_path / "i.npy", "i.npy is not an .npy file of token ids"),
        (tmp_path / "j.npy", r"j.npy holds float64 \(3,\), expected integers"),
        ("hub:wikitext", "expected hub:DATASET:CONFIG:SPLIT"),
    ):
        with pytest.raises(ValueError, match=message):
            read_ids([str(name)], tokenizer)
    ids = np.arange(12).reshape(3, 4)
    np.save(tmp_path / "h.npy", ids)
    assert read_ids([str(tmp_path / "h.npy")], tokenizer).tolist() == ids.ravel().tolist()
    with pytest.raises(ValueError, match=r"got 2 texts with .*h\.npy, expected that file alone"):
        read_ids([*names[:1], str(tmp_path / "h.npy")], tokenizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("perplexity")
    toys.checkpoint(path / "model")
    (path / "text.txt").write_text(toys.VOCAB.decode(IDS[:130].tolist()))
    return path


def tokenizer_of(folder):
    return kvjax.load_tokenizer(str(folder / "model"))


def command(folder, *rest):
    text = () if "--text" in rest else ("--text", folder / "text.txt")
    base = ["perplexity", "--model", folder / "model", *text]
    main([str(a) for a in [*base, "--dtype", "float32", "--length", LENGTH, *rest]])


def test_the_command(folder, tmp_path, capsys):
    names = ("full", "snapkv:kv_size=10")
    policies = [x for name in names for x in ("--policy", name)]
    command(folder, *policies, "--prefix", 40, "--out", tmp_path, "--json", tmp_path / "r.json")
    report = json.loads((tmp_path / "results.json").read_text())
    assert report == json.loads((tmp_path / "r.json").read_text())
    full, small = report["policies"]
    assert full["all"]["items"] == small["all"]["items"] == 2 * (LENGTH - 40)
    assert small["cache_bytes"] < full["cache_bytes"] == full["full_cache_bytes"]
    assert np.sum(small["kept"]["40"]) == 10 * 2 * 2  # layers and KV heads
    capsys.readouterr()
    command(folder, *policies, "--prefix", 40, "--out", tmp_path)
    assert capsys.readouterr().err == f"{tmp_path} is finished: nothing is left to do\n"
    assert json.loads((tmp_path / "results.json").read_text()) == report


def test_token_ids_in_place_of_a_text(folder, tmp_path, capsys):
    reports = []
    np.save(tmp_path / "ids.npy", read_ids([str(folder / "text.txt")], tokenizer_of(folder))[None])
    for text in (folder / "text.txt", tmp_path / "ids.npy"):
        command(folder, "--text", text, "--json", tmp_path / "r.json")
        reports.append(json.loads((tmp_path / "r.json").read_text())["policies"])
    assert reports[0] == reports[1]
    np.save(tmp_path / "far.npy", np.full((1, 200), 10**6))
    with pytest.raises(SystemExit):
        command(folder, "--text", tmp_path / "far.npy")
    assert "far.npy has token 1000000, expected ids of 0 to" in capsys.readouterr().err


def test_bad_input_is_one_line(folder, capsys):
    for rest, message in (
        (("--policy", "snapkv"), "give --prefix"),
        (("--prefix", 60), "prefix is 60, expected 1 to 59"),
        (("--prefix", 9, "--stride", 5), "expected one of them"),
        (("--stride", 61), "stride is 61, expected 1 to 60"),
        (("--length", 500), "length is 500, expected 2 to 131"),
        (("--prefix", 30, "--policy", "pyramidkv:kv_size=9,ring=4"), "known text needs"),
    ):
        with pytest.raises(SystemExit) as stopped:
            command(folder, *rest)
        errors = capsys.readouterr().err
        assert stopped.value.code == 2 and message in errors and errors.count("\n") == 1
