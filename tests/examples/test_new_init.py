"""examples/new_init.py runs and keeps the logits."""

import runpy
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "new_init.py"


def test_new_init(capsys):
    main = runpy.run_path(str(EXAMPLE))["main"]
    assert main() < 1e-4
    assert "does not commute with RoPE" in capsys.readouterr().out
