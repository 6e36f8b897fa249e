"""Other libraries on the project's inputs, in an environment of their own.

    python -m benchmarks.peers kvpress PROMPTS.jsonl MODEL --out ROWS.jsonl [--venv .venv-kvpress]
    python -m benchmarks.peers transmla TOKENS.json MODEL --out OUT.json --code …/transmla …

PROMPTS has one JSON object a line: `task`, and token ids as `prompt` and `answer`, as
`python -m benchmarks.headkv_real --prompts-out` writes them. TOKENS is explained in
transmla_published.py. MODEL is what `kvjax.load` takes; its weights are written as float32 for the
other library, so both compute with the same numbers. The first call makes the environment. An
interrupted run of kvpress continues after its last prompt.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import kvjax
from kvjax.paths import local_path

HERE = Path(__file__).parent
SCRIPTS = {"kvpress": "kvpress_presses.py", "transmla": "transmla_published.py"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", choices=list(SCRIPTS))
    parser.add_argument("inputs", type=local_path, help="PROMPTS or TOKENS")
    parser.add_argument("model")
    parser.add_argument("--out", type=local_path, required=True)
    parser.add_argument("--venv", type=local_path, help="default: .venv-LIBRARY")
    # What the library's script takes besides, such as --kv-sizes.
    args, rest = parser.parse_known_args()
    python = environment_of(args.library, args.venv or Path(f".venv-{args.library}"))
    with tempfile.TemporaryDirectory() as folder:
        model, params = kvjax.load(args.model, dtype="float32")
        kvjax.save(model, params, folder, layout="hf")
        del model, params
        call = [python, HERE / SCRIPTS[args.library], args.inputs, folder, args.out]
        subprocess.run([str(part) for part in [*call, *rest]], check=True)


def environment_of(library: str, folder: Path) -> Path:
    """The Python of the library's environment, which is made if it is not there."""
    python = folder / "bin" / "python"
    needs = HERE / f"requirements-{library}.txt"
    installed = folder / needs.name
    if not installed.is_file() or installed.read_text() != needs.read_text():
        print(f"making {folder}: {', '.join(needs.read_text().splitlines()[1:])}", file=sys.stderr)
        venv.create(folder, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "-r", str(needs)], check=True)
        installed.write_text(needs.read_text())
    return python


if __name__ == "__main__":
    main()
