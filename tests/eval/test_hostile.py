"""No hostile program passes, reads a secret, stops the run, or leaves anything behind."""

import ast
import sys

import hostile
import pytest
from hostile_programs import HELPERS, KEY, KINDS, SLOW, TEST, programs

from eval.sandbox.judge import Program
from eval.sandbox.runner import probe, run_many

if sys.platform != "linux" or probe().refusal():
    pytest.skip("no layers that confine a program", allow_module_level=True)

FILES = ("secrets", "resources", "processes")
"""The kinds that the layers against files decide about."""


def test_the_programs_mean_something():
    """Most are programs, and one that knows the key passes."""
    assert sum(map(len, KINDS.values())) >= 60
    sources = [
        HELPERS + s
        for kind in KINDS
        if kind not in ("syntax", "codecs")
        for s in KINDS[kind].values()
    ]
    assert all(map(ast.parse, sources))
    answer = f"def solve(n): return ({KEY!r}, [{KEY!r}, {{'a': ({KEY!r}, 2.5)}}], 0)[n - 3]"
    (outcome,) = run_many([Program(answer, TEST, "", ("solve",))], 1, hostile.LIMITS)
    assert outcome.passed


def test_all_layers():
    assert hostile.trial(probe()) == []


@pytest.mark.parametrize("off", [("landlock",), hostile.NAMESPACES])
def test_without_a_layer(off):
    layers = probe().without(*off)
    if layers.refusal():
        pytest.skip(f"refused, as it must be: {layers.refusal()}")
    assert hostile.trial(layers, lambda *key: key[0] in FILES and key not in SLOW) == []


def test_without_both_the_task_refuses():
    with pytest.raises(ValueError, match="keeps programs from files"):
        run_many(
            list(programs("", "").values())[:1],
            layers=probe().without("landlock", "mount_namespace"),
        )


def test_nothing_of_the_sandbox_is_left_to_find(tmp_path):
    """An answer's process does not hold the test, however it is asked."""
    everything = "import gc\ndef solve(n): return repr(gc.get_objects())[:10_000_000]"
    test = f"assert {KEY!r} not in solve(0) and 'serve' in solve(0)"
    (outcome,) = run_many([Program(everything, test, "", ("solve",))], 1, hostile.LIMITS)
    assert outcome.reason == "passed"
