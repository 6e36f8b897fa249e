"""Memory of prefill and decode of a long prompt: uncompressed, under HeadKV, and with no cache.

    python -m benchmarks.long_context_memory [--tokens 16384]

A random model reads one prompt and decodes a few tokens. Two numbers for each setting, both without
the parameters: what XLA reserves for the program that needs most (`memory_analysis`) beside the
arrays that exist meanwhile, and by how much the resident memory of a process of its own grows while
it runs them all. "no cache" is the same prefill, of which nothing stays: what a layer needs while
it is read, and no more.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.environment import environment
from kvjax.cache import ModelCache
from kvjax.config import GQAConfig, LayerConfig, MLPConfig, ModelConfig, RopeConfig
from kvjax.decoding import Sampling, decode, first_token
from kvjax.nn import Transformer, param_shapes
from kvjax.nn.transformer import block_kinds, block_program
from kvjax.paths import local_path
from kvjax.policies.compression import Compression
from kvjax.policies.importance import HeadScores
from kvjax.policies.named import resolve
from kvjax.prefilling import OBSERVED, cache_shapes, read_layer, read_prompts

SETTINGS = ("no cache", "full", "headkv")
NO_EOS = np.zeros(0, np.int32)


@dataclass(frozen=True)
class Size:
    """A model and a prompt, of one sequence in fp32."""

    layers: int = 8
    hidden: int = 512
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    mlp: int = 1024
    vocab: int = 512
    tokens: int = 16_384
    new_tokens: int = 32
    kv_size: int = 128

    @property
    def layer_bytes(self) -> int:
        """Keys and values of one layer's prompt."""
        return 2 * self.kv_heads * self.head_dim * self.tokens * 4


@dataclass(frozen=True, eq=False)
class Forget(Compression):
    """Reads like another policy, and keeps nothing of any layer."""

    def start(self, device: Any = None) -> Any:
        """See `Compression.start`."""
        return replace(super().start(device), own=(), pools=(), places=())

    def compress(self, caches: Any, layer: int, prompt: Any) -> Any:
        """See `Compression.compress`."""
        return caches


@dataclass(frozen=True)
class Reserved:
    """What exists while one program runs, in bytes.

    Attributes:
        temporaries, results, arguments: of the program, as XLA reserves them; results are those
            that are not written in place.
        held: caches, and the prompt of the layer before, that are no argument of the program.
    """

    temporaries: int
    results: int
    arguments: int
    held: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.temporaries + self.results + self.arguments + self.held


@dataclass(frozen=True)
class Row:
    """One setting. All but `params_bytes` is without the parameters, in bytes.

    Attributes:
        cache_bytes: what decode holds, room for the new tokens included.
        prefill, decode: the program of each that needs most.
        reserved_peak: the larger of the two totals.
        resident_growth: peak resident memory of a process during both, less what was resident
            before; `resident_before` holds Python, jax, the parameters and the compiled programs.
        seconds: wall time of both in that process.
    """

    setting: str
    params_bytes: int
    cache_bytes: int
    prefill: Reserved
    decode: Reserved | None
    reserved_peak: int
    resident_before: int = 0
    resident_growth: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Check:
    """A bound that a measurement must keep."""

    what: str
    got: float
    bound: float
    holds: bool


def main() -> None:
    args = arguments()
    if args.run is not None:
        print(json.dumps(run(args.run, Size(tokens=args.tokens))))
        return
    rows = []
    for setting in SETTINGS:
        rows.append(measure(setting, Size(tokens=args.tokens)))
        print(line(rows[-1]), flush=True)
    result: dict[str, Any] = {
        "what": "bytes of prefill and decode, without the parameters",
        "size": asdict(Size(tokens=args.tokens)),
        "rows": [asdict(row) for row in rows],
        "checks": [asdict(check) for check in checks(rows, Size(tokens=args.tokens))],
        "more_layers": [],
    }
    for layers in args.more_layers:
        size = Size(layers=layers, tokens=args.tokens)
        rows = [reserved(setting, size) for setting in SETTINGS]
        found = [asdict(check) for check in checks(rows, size)]
        rows = [asdict(row) for row in rows]
        result["more_layers"].append({"size": asdict(size), "rows": rows, "checks": found})
    for check in [*result["checks"], *(c for x in result["more_layers"] for c in x["checks"])]:
        print(check)
    result |= environment("benchmarks.long_context_memory")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {args.out}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    out = Path("benchmarks/results/long_context_memory.json")
    parser.add_argument("--out", type=local_path, default=out)
    parser.add_argument("--tokens", type=int, default=Size.tokens)
    parser.add_argument("--more-layers", type=int, nargs="*", default=[16, 32])
    parser.add_argument("--run", choices=SETTINGS, help="only run this setting, print its memory")
    return parser.parse_args()


def make_model(size: Size) -> Transformer:
    attention = GQAConfig(
        size.heads, size.kv_heads, size.head_dim, size.head_dim**-0.5, RopeConfig(size.head_dim)
    )
    layers = (LayerConfig(attention, MLPConfig(size.mlp)),) * size.layers
    length = size.tokens + size.new_tokens
    return Transformer(
        ModelConfig("llama", size.vocab, size.hidden, layers, max_position_embeddings=length)
    )


def make_work(setting: str, model: Transformer, size: Size) -> Compression:
    """A setting's policy at work; HeadKV's scores are random, a few heads far above the others."""
    samples = np.random.default_rng(0).random((size.layers, size.heads, 1)) ** 4
    name = "full" if setting == "full" else f"headkv:kv_size={size.kv_size}"
    policy = resolve(name, model.config, HeadScores(samples))
    work = policy.compression(model.config, [size.tokens], size.new_tokens, jnp.float32)
    return Forget(**vars(work)) if setting == "no cache" else work


def make_inputs(model: Transformer, size: Size) -> tuple[Any, np.ndarray]:
    """Random parameters, and tokens [1, T]."""
    rng = np.random.default_rng(0)

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.ndim == 1:  # norms
            return jnp.ones(leaf.shape, jnp.float32)
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32) * size.hidden**-0.5)

    params = jax.tree.map(fill, param_shapes(model.config))
    return params, rng.integers(0, size.vocab, (1, size.tokens), dtype=np.int32)


def reserved(setting: str, size: Size) -> Row:
    """What XLA reserves for the programs of prefill and decode, of the last layer."""
    model = make_model(size)
    params, work = param_shapes(model.config), make_work(setting, model, size)
    read, prompt = reading(model, params, size)
    if isinstance(work, Forget):
        largest = dataclasses.replace(read, held=tree_bytes(prompt))
        return Row(setting, tree_bytes(params), 0, largest, None, largest.total)
    caches, last = cache_shapes(work, size.tokens), size.layers - 1
    own = caches.places[last] is None
    before = caches.with_layer(last, None) if own else caches
    read = dataclasses.replace(read, held=tree_bytes((before, prompt)))
    compress = jax.jit(work.compress, static_argnums=1, donate_argnums=0)
    packing = memory_of(compress.lower(before, last, prompt).compile())
    of_prefill = max(read, packing, key=lambda part: part.total)
    of_decode = stepping(model, params, caches, last)
    peak = max(of_prefill.total, of_decode.total)
    return Row(setting, tree_bytes(params), tree_bytes(caches), of_prefill, of_decode, peak)


def reading(model: Transformer, params: Any, size: Size) -> tuple[Reserved, Any]:
    """The program that reads a layer, and the shapes of the prompt that it makes."""
    kind, shape = block_kinds(model.config)[0], jax.ShapeDtypeStruct
    x = shape((1, size.tokens, size.hidden), jnp.float32)
    lengths = shape((1,), jnp.int32)
    arrays = params["layers_0"], kind.pairs, x, lengths, lengths
    traced = read_layer.trace(kind.block, *arrays, observed=OBSERVED)
    compiled = traced.lower().compile()
    return memory_of(compiled, tree_bytes(params["layers_0"])), traced.out_info[1]


def stepping(model: Transformer, params: Any, caches: ModelCache, layer: int) -> Reserved:
    """A layer's program of a decode step."""
    kind, shape = block_kinds(model.config)[layer], jax.ShapeDtypeStruct
    x = shape((1, 1, model.config.hidden_size), jnp.float32)
    own, cache = params[f"layers_{layer}"], jax.eval_shape(lambda caches: caches[layer], caches)
    arrays = own, kind.pairs, x, shape((1, 1), jnp.int32), cache, shape((1,), jnp.int32)
    program: Any = block_program(kind.block, donate=True)  # type: ignore
    compiled = program.lower(*arrays).compile()
    part = memory_of(compiled, tree_bytes(own))
    return dataclasses.replace(part, held=max(tree_bytes(caches) - tree_bytes(cache), 0))


def tree_bytes(shapes: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def memory_of(compiled: Any, params_bytes: int = 0) -> Reserved:
    """`memory_analysis` without the parameters."""
    memory = compiled.memory_analysis()
    return Reserved(
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory.argument_size_in_bytes - params_bytes,
    )


def measure(setting: str, size: Size) -> Row:
    """What XLA reserves, and the memory of a process that runs it."""
    module = [sys.executable, "-m", "benchmarks.long_context_memory"]
    options = ["--run", setting, "--tokens", str(size.tokens)]
    done = subprocess.run([*module, *options], check=True, stdout=subprocess.PIPE, text=True)
    return replace(reserved(setting, size), **json.loads(done.stdout.splitlines()[-1]))


def run(setting: str, size: Size) -> dict[str, float]:
    """Runs prefill and decode in this process: the last three fields of `Row`."""
    model = make_model(size)
    params, tokens = make_inputs(model, size)
    work = make_work(setting, model, size)
    generate(model, params, tokens, work)  # compiles
    gc.collect()
    # What compilation has freed must not be lent to the programs.
    ctypes.CDLL(None).malloc_trim(0)
    before, start = resident("VmRSS"), time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    generate(model, params, tokens, work)
    return {
        "resident_before": before,
        "resident_growth": resident("VmHWM") - before,
        "seconds": round(time.perf_counter() - start, 1),
    }


def generate(model: Transformer, params: Any, tokens: np.ndarray, work: Compression) -> None:
    """Reads the prompt and, unless nothing of it is kept, decodes greedily."""
    logits, (cache,) = read_prompts(model, params, tokens, [work])
    if isinstance(work, Forget):
        jax.block_until_ready(logits)
        return
    greedy, keys = Sampling.create(0.0, 0, 1.0), jax.random.split(jax.random.key(0), 1)
    state = replace(first_token(logits, keys, greedy, NO_EOS), cache=cache)
    del cache
    for _ in decode(model, params, state, greedy, NO_EOS, work.new_tokens):
        pass


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status (Linux): VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(f"{field}:"))


def checks(rows: Sequence[Row], size: Size) -> list[Check]:
    """Two bounds, for what XLA reserves and, where it was measured, for resident memory.

    HeadKV needs no more than prefill without a cache, the compressed cache and 1.25 layers of keys
    and values; and saves 0.9 of what its cache is smaller. While a layer is read its keys and
    values exist, so of L equal layers no more than (L − 1) / L can be saved: 0.875 of 8.
    """
    by_name = {row.setting: row for row in rows}
    full, ours = by_name["full"], by_name["headkv"]
    smaller = full.cache_bytes - ours.cache_bytes
    found = []
    for field in ("reserved_peak", "resident_growth"):
        peaks = {name: getattr(row, field) for name, row in by_name.items()}
        if not all(peaks.values()):
            continue
        name, peak = f"{size.layers} layers, {field}", peaks["headkv"]
        bound = peaks["no cache"] + ours.cache_bytes + 1.25 * size.layer_bytes
        saved = (peaks["full"] - peak) / smaller
        found.append(Check(f"{name}: headkv, MiB", mib(peak), mib(bound), peak <= bound))
        what = f"{name}: saved, of the caches' difference"
        found.append(Check(what, round(saved, 3), 0.9, saved >= 0.9))
    return found


def mib(size: float) -> float:
    return round(size / 2**20, 1)


def line(row: Row) -> str:
    return (
        f"{row.setting:8}: cache {mib(row.cache_bytes):6.1f} MiB, "
        f"of prefill {mib(row.prefill.total):6.1f}, "
        f"reserved {mib(row.reserved_peak):6.1f}, "
        f"resident {mib(row.resident_growth):6.1f} in {row.seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
