"""Files of every kind give the same rows, and bad ones a message with the file and the line."""

import gzip
import json
import lzma
import sys
import types

import pyarrow
import pyarrow.parquet
import pytest
from data_rows import config, plain_rows, word_tokenizer, write

from kvjax.data_files import open_rows
from train.data import DataConfig, SourceConfig, summary

ROWS = [*plain_rows(5), {"query": "naïve\n?", "response": "été"}]


def source(path, form="plain", **options):
    return SourceConfig(str(path), form, **options)


def opened(source):
    return open_rows(source.path, source.split)


def lines():
    return "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", lines),
        ("a.json", lines),
        ("a.jsonl.gz", lambda: gzip.compress(lines())),
        ("a.jsonl.xz", lambda: lzma.compress(lines())),
        ("a.json", lambda: json.dumps(ROWS, indent=2).encode()),
        ("a.json.gz", lambda: gzip.compress(json.dumps(ROWS).encode())),
    ],
)
def test_json(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data())
    rows = opened(source(path))
    assert [rows[i] for i in range(len(rows))] == ROWS
    assert rows[3] == ROWS[3]
    array = data().startswith(b"[") or name == "a.json.gz"
    assert rows.where(2) == f"{path}, {'row 3' if array else 'line 5'}"


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    chats = [{"messages": [{"role": "user", "content": str(i)}]} for i in range(4)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(chats), path, row_group_size=2)
    rows = opened(source(path, "chat"))
    assert len(rows) == 4 and rows[3] == chats[3]
    assert rows.where(3) == f"{path}, row 4"


def test_paragraphs(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n\nOne day,\nshe sang.\n \n\nThe end.\n")
    rows = opened(source(path, "text"))
    assert [rows[i] for i in range(len(rows))] == [
        {"text": "One day,\nshe sang."},
        {"text": "The end."},
    ]
    assert rows.where(1) == f"{path}, line 7"


def test_hub(monkeypatch):
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        if options["split"] == "trian":
            raise ValueError("Unknown split")
        return ROWS

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    rows = opened(source("org/name:part", split="test"))
    assert rows[2] == ROWS[2] and len(rows) == len(ROWS)
    assert rows.where(0) == "org/name:part, row 1"
    opened(source("org/name"))
    assert asked == [
        (("org/name", "part"), {"split": "test"}),
        (("org/name", None), {"split": "train"}),
    ]
    with pytest.raises(ValueError, match="org/name, split 'trian': Unknown split"):
        opened(source("org/name", split="trian"))


def test_hub_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"org/name: no such file, .* install \"kvjax\[data\]\""):
        opened(source("org/name"))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"a,b", "a.csv: unknown kind of file, expected one of .jsonl, .json"),
        ("a.parquet.gz", b"", "unknown kind of file"),
        ("a.jsonl", b"", "a.jsonl has no rows"),
        ("a.jsonl", b"\n \n", "a.jsonl has no rows"),
        ("a.txt", b"\n", "a.txt has no rows"),
        ("a.json", b"[]", "a.json has no rows"),
        ("a.json", b"[{]", "a.json is not JSON"),
        ("a.jsonl.gz", b"{}", "a.jsonl.gz is not a whole .gz file"),
        ("a.jsonl.gz", gzip.compress(b"{}" * 50, mtime=0)[:-9], "is not a whole .gz file"),
        ("a.jsonl.xz", b"{}", "is not a whole .xz file"),
        ("a.parquet", b"{}", "a.parquet is not a parquet file"),
        ("a.txt", b"\xff", "a.txt is not UTF-8"),
    ],
)
def test_bad_files(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        opened(source(tmp_path / name))


@pytest.mark.parametrize("path", ["no/such.jsonl", "no/such/file", "nothing", "a/b.txt.gz"])
def test_missing_files(path):
    with pytest.raises(ValueError, match=f"{path}: no such file"):
        opened(source(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": "10"', "line 3 is not JSON"),
        ("[1, 2]", "line 3 holds a list, expected an object"),
        ("[" * 100_000, "line 3 is not JSON"),
        ('{"query": "10", "answer": "11"}', "line 3: got columns query, answer; .*query, response"),
        ('{"query": "10", "response": ""}', "line 3: no answer to learn"),
    ],
)
def test_bad_rows_are_found_before_training(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    good = json.dumps(ROWS[0])
    path.write_text(f"{good}\n\n{line}\n{good}\n")
    with pytest.raises(ValueError, match=message) as error:
        summary(config(path), word_tokenizer())
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": ()}, "sources is empty"),
        ({"template": "none"}, "template is 'none', expected one of auto, chat"),
        ({"learn": "nothing"}, "learn is 'nothing', expected one of answers, all"),
        ({"long_rows": "cut"}, "long_rows is 'cut', expected one of drop, truncate"),
        ({"batch_size": 0}, "batch_size is 0, expected a whole number from 1"),
        ({"epochs": 0}, "epochs is 0, expected a finite number above 0"),
        ({"epochs": float("nan")}, "epochs is nan, expected a finite number above 0"),
        ({"max_rows": 0}, "max_rows is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"sequence_length": 1}, "sequence_length is 1"),
    ],
)
def test_config_values(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**{"sources": (source("a.jsonl"),), **options})


def test_source_values():
    with pytest.raises(ValueError, match="format is 'metamaths', expected one of metamath, sc2"):
        source("a.jsonl", "metamaths")
    with pytest.raises(ValueError, match=r"weight is -1.0, expected a finite number above 0"):
        source("a.jsonl", weight=-1.0)


def test_max_rows_takes_the_first(tmp_path):
    path = write(tmp_path / "a.jsonl", [*plain_rows(40), {"wrong": "row"}])
    assert summary(config(path, max_rows=40), word_tokenizer()).rows == 40
