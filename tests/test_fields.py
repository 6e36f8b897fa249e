"""Declared fields: what fits a type, the words for it, and one line for each problem."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
from annotated_types import Len

from kvjax.checks import Range
from kvjax.fields import (
    Count,
    Flag,
    Name,
    Number,
    Object,
    OneOf,
    Positive,
    Problems,
    Share,
    Size,
    Text,
    build,
    check_fields,
    fits,
    object_problems,
    refuse,
    within,
    words,
)
from kvjax.text_files import parse_json, read_yaml

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (Count, [1, 2**31 - 1], [0, -1, 2**31, 10**400, 1.0, True, "1", None, [1], NAN]),
        (Size, [0], [-1, 0.0, False]),
        (Number, [0, -1.5, 10**30], [NAN, INF, 10**40, "1", True, None]),
        (Positive, [1e-30, 2], [0, -1, 1e-50]),
        (Share | None, [0, 1, 0.5, None], [1.01, "0.5", []]),
        (Text, ["", "x"], [1, None, b"x"]),
        (Name, ["x"], ["", 1]),
        (Flag, [True, False], [0, 1, "yes", "true", None]),
        (Object, [{}, {"x": 1}], [[], None, "{}"]),
        (list[Size], [[], [0, 1]], [[-1], [1.5], 3, "12", (1,)]),
        (Annotated[list[Text], Len(1)], [["x"]], [[], [1]]),
        (Annotated[str, OneOf(("a", "b"))], ["a"], ["c", 1, ["a"], None]),
        (Literal[2], [2], [3, "2", 2.5]),
    ],
)
def test_what_fits(kind, good, bad):
    assert [value for value in good if not fits(value, kind)] == []
    assert [value for value in bad if fits(value, kind)] == []


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Count, "a whole number from 1 to 2147483647"),
        (Share | None, "a finite number from 0 to 1 or null"),
        (Annotated[float, Range(above=0, most=1)], "a finite number above 0 and of at most 1"),
        (list[Text], "a list, each a text"),
        (Annotated[list[Text], Len(2)], "a list of at least 2, each a text"),
        (tuple[Count, Count], "a list of 2, each a whole number from 1 to 2147483647"),
        (Literal["a", "b"] | None, "one of a, b or null"),
        (dict[str, Number], "an object"),
        (Path | None, "a path or null"),
    ],
)
def test_words(kind, said):
    assert words(kind) == said


@dataclass(frozen=True)
class Part:
    size: Count
    pair: tuple[Size, Size] = (0, 1)


@dataclass(frozen=True)
class Whole:
    part: Part
    parts: tuple[Part, ...]
    shares: dict[str, Share]
    rate: Positive | None = None

    def __post_init__(self):
        check_fields(self)
        if self.rate == 7:
            raise ValueError("rate is 7, expected another")


GOOD = {"part": {"size": 1}, "parts": [{"size": 2, "pair": [3, 4]}], "shares": {"a": 1}}


def problems_of(**changes):
    with pytest.raises(Problems) as error:
        build(Whole, {**GOOD, **changes}, "a.json")
    return list(error.value.lines)


def test_a_dataclass_is_built():
    assert build(Whole, GOOD, "a.json") == Whole(Part(1), (Part(2, (3, 4)),), {"a": 1})
    more = {**GOOD, "part": {"size": 1, "other": 3}}
    assert build(Whole, more, "a.json", others=True).part == Part(1)


def test_all_problems_of_a_file_are_one_error():
    count = words(Count)
    assert problems_of(
        part={"size": "1", "other": 2}, parts=[{"pair": [1]}, 3], shares={"a": 2}, more=1, rate=-1
    ) == [
        f"a.json: part.size is '1', expected {count}",
        "a.json: part has an unknown field 'other', expected some of size, pair",
        f"a.json: parts[0].size is missing, expected {count}",
        f"a.json: parts[0].pair is [1], expected {words(tuple[Size, Size])}",
        "a.json: parts[1] is 3, expected an object (Part)",
        "a.json: shares.a is 2, expected a finite number from 0 to 1",
        "a.json: rate is -1, expected a finite number above 0 or null",
        "a.json: got an unknown field 'more', expected some of part, parts, shares, rate",
    ]
    assert problems_of(rate=7) == ["a.json: rate is 7, expected another"]
    with pytest.raises(Problems, match=r"^a.json: it is \[\], expected an object"):
        build(Whole, [], "a.json")


def test_python_values_are_checked_alike():
    with pytest.raises(Problems) as error:
        Whole(Part(0), (Part(1), Part(2, (-1, 1))), {"a": NAN})
    assert error.value.lines == (
        f"part.size is 0, expected {words(Count)}",
        f"parts[1].pair[0] is -1, expected {words(Size)}",
        "shares.a is nan, expected a finite number from 0 to 1",
    )
    assert dataclasses.replace(Whole(Part(1), (), {}), rate=1e-3).rate == 1e-3


def test_ten_lines_and_a_count():
    with pytest.raises(Problems) as error:
        refuse((f"line {i}" for i in range(13)), "a.json")
    lines = str(error.value).splitlines()
    assert lines[9:] == ["a.json: line 9", "and 3 more problems"]
    with pytest.raises(Problems, match=r"^b: line 0\nb: line 1$"), within("b"):
        refuse(["line 0", "line 1"])
    refuse([], "a.json")


def test_long_values_and_names_are_cut():
    with pytest.raises(Problems) as error:
        refuse(object_problems({"x" * 9999: 1, "a": "y" * 9999}, {"a": Count}, others=False), "f")
    assert max(map(len, error.value.lines)) < 1100


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b'{"a": 1, "a": 2}', "'a' comes twice"),
        (b'["\\ud800"]', "not JSON"),
        (b"[" * 100_000, "recursion limit"),
        (b"\xff\xfe{\x00", "not UTF-8"),
        (b"9" * 5000, "not JSON"),
        (b"", "EOF"),
    ],
)
def test_json_that_is_refused(text, said):
    with pytest.raises(ValueError, match=f"^a.json is .*{said}"):
        parse_json(text, "a.json")


def test_yaml_has_the_numbers_of_json_and_no_bombs(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: 1e-3\nb: -2E+4\nc: 1e-3x\nd: '1e-3'\ne: &x [1]\nf: *x\n")
    assert read_yaml(path, "train") == {
        "a": 1e-3, "b": -2e4, "c": "1e-3x", "d": "1e-3", "e": [1], "f": [1],
    }  # fmt: skip
    path.write_text("")
    assert read_yaml(path, "train") == {}
    bomb = "a0: &a0 [x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
    )
    for text, said in (
        (bomb, "aliases that stand for more than 100000 values"),
        ("a: &a [*a]", "aliases that stand for"),
        ("a: 1\na: 2", "'a' comes twice"),
        ("1: 2", "got the name 1, expected a text"),
        ("- 1", "holds a list, expected names and values"),
        ("a: !!python/object:os.system x", "is not YAML"),
        ("a: !!float ''", "is not YAML"),
        ("a: " + "[" * 5000, "is not YAML"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"^{path} .*{said}"):
            read_yaml(path, "train")
