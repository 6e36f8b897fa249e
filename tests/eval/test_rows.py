"""Rows and texts of local files: packed or not, and what is said of damaged ones."""

import gzip
import json
import lzma
import sys

import pytest

from eval import rows
from eval.task import TaskOptions
from eval.tasks import longbench
from kvjax import data_files


def write(path, *values):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(value) + "\n" for value in values)
    packs = {".gz": gzip.compress, ".xz": lzma.compress}
    path.write_bytes(packs.get(path.suffix, bytes)(content.encode()))
    return path


@pytest.mark.parametrize("end", ["", ".gz", ".xz"])
def test_reads_plain_and_packed_lines(tmp_path, end):
    path = write(tmp_path / f"a.jsonl{end}", {"x": 1}, {"x": 2})
    assert rows.find(tmp_path, "a") == path
    assert [row.values["x"] for row in rows.read_rows(path)] == [1, 2]
    assert len(rows.read_rows(path, limit=1)) == 1


def test_a_corrupt_line_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"x": 1}\n\n{"x": \n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3 is not JSON"):
        rows.read_rows(path)
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1 holds a list, expected an object"):
        rows.read_rows(path)


@pytest.mark.parametrize("value", ["[" * 100_000, "1" * 5000])
def test_brackets_too_deep_and_numbers_too_long(tmp_path, value):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"x": {value}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1 is not JSON: "):
        rows.read_rows(path)
    with pytest.raises(ValueError, match=r"a\.jsonl is not JSON: "):
        data_files.read_json(path)


def test_a_missing_file_says_what_is_expected(tmp_path):
    with pytest.raises(ValueError, match=r"no .*a\.jsonl \(nor .gz, .xz\): expected rows"):
        rows.find(tmp_path, "a", of="rows")


def test_damaged_and_empty_files(tmp_path):
    packed = gzip.compress(b'{"x": 1}')
    for damaged in (b"no archive", packed[:-9], packed[:10] + b"\xff" * 4 + packed[14:]):
        (tmp_path / "a.jsonl.gz").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.jsonl\.gz is not a whole"):
            rows.read_rows(tmp_path / "a.jsonl.gz")
    (tmp_path / "b.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match="is not UTF-8"):
        rows.read_rows(tmp_path / "b.jsonl")
    (tmp_path / "c.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="has no rows"):
        rows.read_rows(tmp_path / "c.jsonl")


def test_columns_that_are_missing_or_no_text():
    row = rows.Row("file, line 7", {"a": 1})
    with pytest.raises(ValueError, match="file, line 7: no 'b', got a"):
        row.text("b", "c")
    with pytest.raises(ValueError, match="'a' is 1, expected text"):
        row.text("a")


def test_the_hub_needs_a_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"owner/name.* hub: .* pip install \"kvjax\[data\]\""):
        rows.hub_rows("owner/name", "config", "test")


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "longbench"
    write(place / "dataset2prompt.json", dict.fromkeys(longbench.SUBSETS, "{context}{input}"))
    write(place / "dataset2maxlen.json", dict.fromkeys(longbench.SUBSETS, 9))
    write(place / "lcc.jsonl", {"input": "", "context": "", "answers": ["x"]})
    return tmp_path


@pytest.mark.parametrize("answers", ["right", [], [None], [["right"]], {"a": 1}])
def test_references_that_are_no_texts(folder, answers):
    row = {"input": "", "context": "", "answers": answers}
    write(folder / "longbench" / "lcc.jsonl", row)
    with pytest.raises(ValueError, match=r"line 1: 'answers' is .*expected a list of texts"):
        longbench.load(TaskOptions(data_dir=folder))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("dataset2maxlen", {"qasper": "9"}, "qasper is '9', expected a whole number"),
        ("dataset2maxlen", {"qasper": 0}, "qasper is 0, expected a whole number"),
        ("dataset2maxlen", {"qasper": float("nan")}, "qasper is nan, expected a whole number"),
        ("dataset2prompt", {"qasper": 5}, "qasper is 5, expected a text"),
        ("dataset2prompt", [1], "expected an object"),
    ],
)
def test_prompts_and_lengths_without_a_meaning(folder, name, value, said):
    write(folder / "longbench" / f"{name}.json", value)
    with pytest.raises(ValueError, match=rf"{name}\.json.*{said}"):
        longbench.load(TaskOptions(data_dir=folder))
