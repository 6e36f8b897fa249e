"""Memory and time of conversions at the shape of Qwen2.5-14B, whose 29.5 GB need not fit anywhere.

    python -m benchmarks.convert_stream equal_cache|decoupled [--layers 48] [--small] [--work DIR]

A shard of the checkpoint, one layer, holds random weights only while `kvjax convert` reads it;
otherwise its file is a hole. This process looks through every layer that is written, and deletes
it: its untouched weights must be those of the source bit for bit, its attention must be finite and,
for equal_cache, give the keys and values of the source. `kvjax convert` runs in a process of its
own, whose peak memory is reported. The goal: below 6 GB. With --work, a run that was stopped, the
converting process too, goes on with the same command.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Every run compiles: the times include it.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
# On a busy machine, threads that wait for each other made the SVDs ten times slower.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import ml_dtypes
import numpy as np

from benchmarks.environment import environment
from kvjax.checkpoint_files import INDEX, NewTensor, read_head, read_header, write_file
from kvjax.hf import config_from_hf, open_params
from kvjax.hf.layout import Tensor, layouts, tensors
from kvjax.hf.weights import LazyParams
from kvjax.nn import Transformer, param_shapes
from kvjax.paths import local_path

RESULTS = Path("benchmarks/results/convert_stream.json")
QWEN = {
    "model_type": "qwen2",
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "vocab_size": 152064,
    "max_position_embeddings": 131072,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
SMALL = {
    "hidden_size": 320,
    "intermediate_size": 864,
    "num_attention_heads": 10,
    "num_key_value_heads": 2,
    "vocab_size": 9504,
}
CHUNK = 4 << 20  # random numbers that are made at a time
BF16 = np.dtype(ml_dtypes.bfloat16)
CALIBRATION = (9, 64)  # sequences and their length; the eighth is held out


class Shards:
    """A checkpoint whose files are holes but for the one that is read."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.raw = json.loads((directory / "config.json").read_text())
        self.tensors: dict[str, list[Tensor]] = {}
        for tensor in expected_tensors(self.raw):
            self.tensors.setdefault(tensor.params[0][0], []).append(tensor)

    @classmethod
    def lay_out(cls, directory: Path, raw: dict[str, Any]) -> int:
        """Writes config.json, index and headers; bytes of all tensors."""
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(raw))
        weight_map, total = {}, 0
        for name, found in cls(directory).tensors.items():
            file = directory / f"{name}.safetensors"
            new = [NewTensor(t.name, BF16, t.shape, lambda: np.zeros(0, BF16)) for t in found]
            write_file(file, new)  # no values: the header alone
            size = sum(t.nbytes for t in new)
            os.truncate(file, file.stat().st_size + size)
            weight_map |= {tensor.name: file.name for tensor in found}
            total += size
        (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        return total

    @contextmanager
    def filled(self, name: str) -> Iterator[None]:
        """With the random weights of a part in its file."""
        file = self.directory / f"{name}.safetensors"
        size, header = file.stat().st_size, read_header(file)
        start = min(tensor.start for tensor in header.values())
        with file.open("r+b") as out:
            for tensor in self.tensors[name]:
                out.seek(header[tensor.name].start)
                for values in random_values(tensor):
                    out.write(values.data)
        try:
            yield
        finally:
            os.truncate(file, start)  # only the hole that follows frees the disk
            os.truncate(file, size)

    def open(self, path: str | Path, dtype: Any, mesh: Any = None) -> LazyParams:
        """`kvjax.hf.open_params` with every part made before it is read."""
        params = open_params(path, dtype, mesh)

        def read(name: str) -> Any:
            with self.filled(name):
                return params[name]

        return LazyParams(params, read)


def expected_tensors(raw: dict[str, Any]) -> list[Tensor]:
    """The tensors of a checkpoint with that config.json."""
    model = Transformer(config_from_hf(raw))
    flat = jax.tree_util.tree_leaves_with_path(param_shapes(model.config))
    shapes = {tuple(key.key for key in path): tuple(leaf.shape) for path, leaf in flat}
    return tensors(model.config, shapes, layouts(model.config)[0])


def random_values(tensor: Tensor) -> Iterator[np.ndarray]:
    """bf16 numbers as bits: random sign, seven bits of fraction and two of the exponent.

    Their root mean square is within √2 of 1/√fan_in, or 0.1 for biases; norms are 1.
    """
    size = int(np.prod(tensor.shape))
    if tensor.name.endswith("norm.weight"):
        yield np.ones(size, BF16).view(np.uint16)
        return
    wanted = tensor.shape[-1] ** -0.5 if len(tensor.shape) > 1 else 0.1
    exponent = round(np.log2(wanted / 7.04)) + 127  # 7.04: with the exponents 0 to 3
    bits = np.random.Philox(list(tensor.name.encode()))
    for start in range(0, size, CHUNK):
        count = min(CHUNK, size - start)
        values = bits.random_raw(-(-count // 4)).view(np.uint16)[:count]
        values &= 0x81FF
        values += np.uint16(exponent << 7)
        yield values


def convert(directory: Path, arguments: list[str]) -> None:
    """`kvjax convert`, reading through `Shards`."""
    from kvjax.cli import main

    shards = Shards(directory)
    with mock.patch("kvjax.commands.convert.open_params", shards.open):
        main(["convert", str(directory), *arguments])


class Checker:
    """Looks through what is written, and deletes it."""

    def __init__(self, shards: Shards, out: Path, progress: Progress):
        self.source = shards.open(shards.directory, "bfloat16")
        self.out, self.progress = out / "params", progress

    def sweep(self) -> None:
        """All parts that are complete: orbax gives a part its name when it is."""
        for part in sorted(self.out.iterdir()) if self.out.is_dir() else ():
            done = self.progress.checked
            if part.name in self.source and part.name not in done and self.counted(part.name):
                self.check(part)
                done.append(part.name)
                shutil.rmtree(part)
                print(f"{self.progress.seconds:7.0f} s", part.name, flush=True)

    def counted(self, name: str) -> bool:
        """Whether the conversion would not write a layer again."""
        if not name.startswith("layers_"):
            return True
        try:
            metadata = read_head(self.out.parent / "unfinished.safetensors")[1]
        except FileNotFoundError:  # all is written
            return True
        return int(name[7:]) < len(json.loads(metadata["attention"]))

    def check(self, part: Path) -> None:
        """Raises AssertionError where a part is not what it must be."""
        import orbax.checkpoint as ocp

        with ocp.StandardCheckpointer() as checkpointer:
            got = checkpointer.restore(part)[part.name]
        want = self.source[part.name]
        if not part.name.startswith("layers_"):
            assert _same(got, want), part.name
            return
        attn, base = got.pop("attn"), want.pop("attn")
        assert jax.tree.all(jax.tree.map(_same, got, want)), part.name
        for leaf in jax.tree.leaves(attn):
            assert np.isfinite(np.asarray(leaf, np.float32)).all(), part.name
        if "k_down" in attn:
            assert _same(attn["q"], base["q"]) and _same(attn["o"], base["o"]), part.name
            self.progress.errors += [_factor_error(attn, base, name) for name in "kv"]


def _same(a: Any, b: Any) -> bool:
    return np.array_equal(np.asarray(a).view(np.uint16), np.asarray(b).view(np.uint16))


def _factor_error(attn: dict[str, Any], base: dict[str, Any], name: str) -> float:
    """Relative error of down · up on random inputs, against the projection that was factored."""

    def fp64(x: Any) -> np.ndarray:
        return np.asarray(x).astype(np.float64)

    x = np.random.default_rng(0).standard_normal((4, len(base[name])))
    down = np.einsum("bd,dcx->bcx", x, fp64(attn[f"{name}_down"])) + fp64(attn[f"{name}_down_bias"])
    got = np.einsum("bcx,cxmh->bcmh", down, fp64(attn[f"{name}_up"]))
    want = np.einsum("bd,dkh->bkh", x, fp64(base[name])) + fp64(base[f"{name}_bias"])
    want = np.repeat(want, got.shape[1] * got.shape[2] // want.shape[1], axis=1)
    return float(np.abs(got.reshape(want.shape) - want).max() / np.abs(want).max())


class Progress:
    """What is known of a conversion, over all processes that worked on it."""

    def __init__(self, file: Path):
        self.file = file
        self.checked: list[str] = []
        self.errors: list[float] = []
        self.seconds, self.peak, self.stops = 0.0, 0, 0
        if file.exists():
            vars(self).update(json.loads(file.read_text()))
            self.stops += 1
        self._before, self._start = self.seconds, time.monotonic()

    def note(self, pid: int) -> None:
        """Keeps the time, and the peak memory of a process that works."""
        self.seconds = self._before + time.monotonic() - self._start
        status = Path(f"/proc/{pid}/status").read_text()
        if found := re.search(r"VmHWM:\s+(\d+) kB", status):
            self.peak = max(self.peak, int(found[1]) * 1024)
        kept = ("checked", "errors", "seconds", "peak", "stops")
        self.file.write_text(json.dumps({name: getattr(self, name) for name in kept}))


def measure(method: str, raw: dict[str, Any], ranks: tuple[int, int], root: Path) -> dict[str, Any]:
    """One conversion, and what was found of it."""
    source, again, out = root / "source", root / "again", root / "out"
    report = root / "report.json"
    root.mkdir(parents=True, exist_ok=True)
    for directory in (source, again):  # two processes would fill the same files
        shutil.rmtree(directory, ignore_errors=True)
        nbytes = Shards.lay_out(directory, raw)
    options = ["--method", method, "--dtype", "bfloat16", "--json", str(report)]
    if method == "decoupled":
        rng = np.random.default_rng(1)
        np.save(root / "tokens.npy", rng.integers(0, raw["vocab_size"], CALIBRATION))
        options += ["--kv-rank", str(ranks[0]), "--rope-dim", str(ranks[1])]
        options += ["--calibration", str(root / "tokens.npy")]
    command = [sys.executable, "-m", "benchmarks.convert_stream", "--child", str(source), str(out)]
    progress = Progress(root / "progress.json")
    checker = Checker(Shards(again), out, progress)
    with subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL) as child:
        while child.poll() is None:
            checker.sweep()
            progress.note(child.pid)
            time.sleep(0.5)
    if child.returncode:
        raise SystemExit(f"kvjax convert exited with {child.returncode}")
    checker.sweep()
    assert sorted(progress.checked) == sorted(checker.source), "a part was not written"
    found = json.loads(report.read_text())
    found["seconds"] = round(progress.seconds, 1)
    found["peak_memory_bytes"] = max(progress.peak, found["peak_memory_bytes"])
    return {
        "checkpoint_bytes": nbytes,
        "parts_checked": len(progress.checked),
        "stops": progress.stops,
        **({"largest_factor_error": max(progress.errors)} if progress.errors else {}),
        **found,
    }


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        convert(Path(sys.argv[2]), sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=["equal_cache", "decoupled"])
    parser.add_argument("--layers", type=int, default=QWEN["num_hidden_layers"])
    parser.add_argument("--small", action="store_true", help="a sixteenth of every width")
    parser.add_argument("--work", type=local_path, help="directory to work in, and to go on in")
    parser.add_argument("--out", type=local_path, default=RESULTS)
    args = parser.parse_args()
    where = environment("benchmarks.convert_stream")  # before the commit can change
    raw = {**QWEN, **(SMALL if args.small else {}), "num_hidden_layers": args.layers}
    ranks = (48, 16) if args.small else (448, 128)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "work" if args.work is None else args.work
        found = measure(args.method, raw, ranks, root)
    result = {"environment": where, "layers": args.layers, **found}
    print(json.dumps(result, indent=1))
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    results[args.method] = result
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
