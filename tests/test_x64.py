"""Everything with 64-bit types on, as `JAX_ENABLE_X64=1` has it: what is 32 bits wide stays so."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
QUICK = ("tests/headkv/test_sharing.py", "tests/x64")


def test_the_quick_tests_pass_with_64_bit_types():
    """In an interpreter of their own: jax reads the setting at its start."""
    kept = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *QUICK],
        cwd=ROOT,
        env=kept | {"JAX_ENABLE_X64": "1", "KVJAX_TEST_X64": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
