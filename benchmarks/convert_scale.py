"""Time and memory of a conversion at the shape of Qwen2.5-0.5B, from and to disk.

    python -m benchmarks.convert_scale [--tokens 32768] [--out FILE.json]

A random bf16 checkpoint of that shape is written to a temporary directory and converted by
`kvjax convert --method decoupled` in a process of its own. The goal: peak memory above that of the
interpreter with its imports within 2.5 times the checkpoint's size.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Every run compiles: the times include it.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")

import jax
import ml_dtypes
import numpy as np

from benchmarks.environment import environment
from kvjax.checkpoint_files import NewTensor, write
from kvjax.hf import config_from_hf
from kvjax.hf.layout import layouts, tensors
from kvjax.nn import Transformer, param_shapes
from kvjax.paths import local_path

QWEN = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
IMPORTS = "import resource, jax, kvjax, kvjax.commands.convert; jax.devices(); "
PEAK = "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"


def write_checkpoint(directory: Path, layers: int) -> int:
    """A random bf16 checkpoint; bytes of its tensors. One tensor in memory at a time."""
    raw = {**QWEN, "num_hidden_layers": layers}
    model = Transformer(config_from_hf(raw))
    flat = jax.tree_util.tree_leaves_with_path(param_shapes(model.config))
    shapes = {tuple(key.key for key in path): tuple(leaf.shape) for path, leaf in flat}
    rng = np.random.default_rng(0)

    def new(tensor: Any) -> NewTensor:
        def values() -> np.ndarray:
            if len(tensor.shape) == 1:
                bias = 0.0 if tensor.name.endswith("bias") else 1.0
                return np.full(tensor.shape, bias, ml_dtypes.bfloat16)
            noise = rng.standard_normal(tensor.shape, dtype=np.float32) / tensor.shape[-1] ** 0.5
            return noise.astype(ml_dtypes.bfloat16)

        return NewTensor(tensor.name, np.dtype(ml_dtypes.bfloat16), tensor.shape, values)

    found = [new(t) for t in tensors(model.config, shapes, layouts(model.config)[0])]
    directory.mkdir()
    write(directory, found)
    (directory / "config.json").write_text(json.dumps(raw))
    return sum(tensor.nbytes for tensor in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument(
        "--out", type=local_path, default=Path("benchmarks/results/convert_scale.json")
    )
    args = parser.parse_args()
    # First of all: a child's peak begins with what its parent held when it was started.
    interpreter = int(subprocess.check_output([sys.executable, "-c", IMPORTS + PEAK]))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        nbytes = write_checkpoint(root / "source", args.layers)
        ids = np.random.default_rng(1).integers(0, QWEN["vocab_size"], (args.tokens // 256, 256))
        np.save(root / "tokens.npy", ids.astype(np.int32))
        command = [
            *(sys.executable, "-m", "kvjax.cli", "convert", str(root / "source")),
            *(str(root / "out"), "--method", "decoupled", "--kv-rank", "96", "--rope-dim", "32"),
            *("--calibration", str(root / "tokens.npy"), "--dtype", "bfloat16"),
            *("--calibration-tokens", str(args.tokens), "--json", str(root / "report.json")),
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        report = json.loads((root / "report.json").read_text())
    above = report["peak_memory_bytes"] - interpreter
    result = {
        "environment": environment("benchmarks.convert_scale"),
        "checkpoint_bytes": nbytes,
        "interpreter_bytes": interpreter,
        "peak_above_interpreter_bytes": above,
        "peak_over_checkpoint": round(above / nbytes, 2),
        **report,
    }
    print(json.dumps(result, indent=1))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
