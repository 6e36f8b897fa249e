"""Values between an answer and its test: what goes in comes out, of the same type."""

import collections
import datetime
import decimal
import enum
import fractions
import json
import math

import pytest

from eval.sandbox import values
from eval.sandbox.judge import Program
from eval.sandbox.runner import probe, run_many

DAY = datetime.datetime(2026, 11, 30, 1, 2, 3, 4)
PLAIN = [
    *(
        None,
        True,
        False,
        0,
        -1,
        2**53,
        -(10**5000),
        0.1,
        -0.0,
        math.inf,
        1 + 2j,
        "",
        "\ud800é\0",
        b"\xff",
    ),
    *([], [1, [2.5, "x"]], (), (1, (2,)), {1, "a"}, frozenset({1}), {}, {1: [2], (3,): {4}}),
    *(range(1, 9, 2), collections.Counter("aab"), collections.deque([1, 2]), bytearray(b"ab"), int),
    *(collections.OrderedDict(b=1, a=2), {1: 2}.keys(), {1: 2}.items()),
    *(fractions.Fraction(1, 3), decimal.Decimal("1.50"), DAY, DAY.date(), DAY.time()),
    datetime.timedelta(-1, 2, 3),
]


class Color(enum.IntEnum):
    RED = 1


Point = collections.namedtuple("Point", "x y")


def over(value):
    """The value at the other end of the line."""

    def refuse(part):
        raise TypeError(type(part).__name__)

    return values.decode(json.loads(values.message(values.encode(value, refuse))), refuse)


@pytest.mark.parametrize("value", PLAIN, ids=lambda value: type(value).__name__)
def test_plain_values(value):
    found = over([value])
    assert found == [value] and type(found[0]) is type(value)


def test_other_values():
    assert math.isnan(over(math.nan)) and math.copysign(1, over(-0.0)) == -1
    assert list(over({1: 2}.values())) == [2]
    for value, plain in (
        (Color.RED, 1),
        (Point(1, 2), (1, 2)),
        (collections.defaultdict(int, a=1), {"a": 1}),
    ):
        assert over(value) == plain and type(over(value)) is type(plain)
    for value in (object(), iter([]), len, [Color]):
        with pytest.raises(TypeError):
            over(value)


@pytest.mark.parametrize(
    "form",
    [
        *(
            {},
            {"a": 1, "b": 2},
            {"eval": "1"},
            {"int": 3},
            {"int": "x"},
            {"tuple": 3},
            {"set": [[]]},
        ),
        *(
            {"dict": [[1]]},
            {"dict": [[[], 1]]},
            {"range": [0, 1, 0]},
            {"range": [0.5]},
            {"type": "eval"},
        ),
        *(
            {"complex": [1, 2]},
            {"bytes": "g"},
            {"Decimal": "x"},
            {"Fraction": [1, 0]},
            {"date": [0, 0, 0]},
        ),
    ],
)
def test_what_is_no_form(form):
    with pytest.raises((ValueError, TypeError, KeyError, ArithmeticError)):
        values.decode(form, lambda content: None)


def test_arguments_change_in_place():
    inner = [1]
    old = [inner, {"a": inner}, (inner, 2), {5}]
    values.refresh(old, [[1, 9], {"a": [3], "b": 0}, ([1, 9], 2), {6}, "more"])
    assert old == [[1, 9], {"a": [1, 9], "b": 0}, ([1, 9], 2), {6}, "more"]
    assert old[0] is inner


ANSWER = """
import collections
class Node:
    def __init__(self, value): self.value, self.left = value, None
def depth(node): return 0 if node is None else 1 + depth(node.left)
def count(n): yield from range(n)
def scale(n): return lambda x: n * x
def push(items, item): items.append(item)
def fail(kind): raise {1: ValueError("bad"), 2: type("Own", (Exception,), {})("bad")}[kind]
def pick(items, kind): return [item for item in items if type(item) is kind]
"""
TESTS = {
    "root = Node(1); root.left = Node(2); assert depth(root) == root.left.value": "passed",
    "assert list(count(3)) == [0, 1, 2] and sum(count(4)) == 6": "passed",
    "assert scale(3)(2) == 6": "passed",
    "items = [1]; push(items, item=2); assert items == [1, 2]": "passed",
    "try: fail(1)\nexcept ValueError as e: assert str(e) == 'bad'\nelse: assert 0": "passed",
    "fail(2)": "Own: bad",
    "assert pick([1, 'a', 2.5], str) == ['a']": "passed",
    "assert count(3) == 3": "TypeError: an object of the answer's type 'generator'",
    "assert count(3)": "TypeError: an object of the answer's type 'generator'",
    "push(lambda: 1, 2)": "TypeError: a function cannot be given to an answer",
    "other()": "NameError: name 'other' is not defined",
}
"""Test → how it ends."""


def test_what_a_test_can_ask():
    if probe().refusal():
        pytest.skip(probe().refusal() or "")
    names = ("Node", "depth", "count", "scale", "push", "fail", "pick")
    outcomes = run_many([Program(ANSWER, test, "", names) for test in TESTS], 1)
    for (test, reason), outcome in zip(TESTS.items(), outcomes, strict=True):
        assert outcome.reason.startswith(reason), test
