"""The examples of a scorer and an allocator of one's own run and make the cache smaller."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("name", ["new_scorer", "new_allocator"])
def test_example(name, capsys):
    out = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]()
    assert len(out.tokens[0]) == 8
    assert out.cache_bytes < 0.5 * out.full_cache_bytes
    assert str(out.cache_bytes) in capsys.readouterr().out


def test_a_sampling_loop_over_a_compressed_cache(capsys):
    module = runpy.run_path(str(EXAMPLES / "sampling_loop.py"))
    answer = module["main"]()
    assert len(answer) == 4 and capsys.readouterr().out.strip()
    body = (EXAMPLES / "sampling_loop.py").read_text().split("def sample")[1].split("\n\n")[0]
    assert len(body.splitlines()) <= 15
