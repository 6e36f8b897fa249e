"""Memory of prefill and decode of a long prompt: uncompressed, under HeadKV, and with no cache.

    python -m benchmarks.long_context_memory [--tokens 16384]

A random model reads one prompt and decodes a few tokens. Two numbers for each setting, both without
the parameters: what XLA reserves for the compiled programs (`memory_analysis`), and by how much the
resident memory of a process of its own grows while it runs them. "no cache" is the same prefill, of
which nothing stays: what a layer needs while it is read, and no more.
"""

from __future__ import annotations

import argparse
import ctypes
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
from kvjax.config import GQAConfig, LayerConfig, MLPConfig, ModelConfig, RopeConfig
from kvjax.decoding import decode, first_token, prefill
from kvjax.headkv.plan import FullPlan, Plan
from kvjax.headkv.policy import resolve
from kvjax.headkv.scores import HeadScores
from kvjax.nn import Transformer
from kvjax.paths import local_path
from kvjax.sampling import Sampling

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


@dataclass(frozen=True)
class ForgetPlan(Plan):
    """The prefill of another plan, of which no layer's cache stays."""

    of: Plan

    def start(self, layer: int, batch: int, prompt_len: int, room: int, dtype: Any) -> Any:
        """See `Plan.start`."""
        return self.of.start(layer, batch, prompt_len, room, dtype)

    def finish(self, layer: int, cache: Any, room: int) -> tuple[()]:
        """See `Plan.finish`."""
        return ()


@dataclass(frozen=True)
class Reserved:
    """What XLA reserves for one program, in bytes; `results` are those not written in place."""

    temporaries: int
    results: int
    arguments: int


@dataclass(frozen=True)
class Row:
    """One setting. All but `params_bytes` is without the parameters, in bytes.

    Attributes:
        cache_bytes: what decode holds, room for the new tokens included.
        reserved_peak: the larger of the two programs' arguments, results and temporaries.
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


def make_plan(setting: str, model: Transformer, size: Size) -> Plan:
    """The plan of a setting; HeadKV's scores are random, a few heads far above the others."""
    if setting == "full":
        return FullPlan(model.config)
    samples = np.random.default_rng(0).random((size.layers, size.heads, 1)) ** 4
    policy = resolve(f"headkv:kv_size={size.kv_size}", model.config, HeadScores(samples))
    plan = policy.plan(model.config, size.tokens, jnp.float32)
    return plan if setting == "headkv" else ForgetPlan(plan)


def make_inputs(model: Transformer, size: Size) -> tuple[Any, jax.Array, jax.Array]:
    """Random parameters, tokens [1, T] and lengths [1]."""
    rng = np.random.default_rng(0)

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.ndim == 1:  # norms
            return jnp.ones(leaf.shape, jnp.float32)
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32) * size.hidden**-0.5)

    params = jax.tree.map(fill, param_shapes(model))
    tokens = jnp.asarray(rng.integers(0, size.vocab, (1, size.tokens)), jnp.int32)
    return params, tokens, jnp.asarray([size.tokens], jnp.int32)


def param_shapes(model: Transformer) -> Any:
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


@dataclass(frozen=True)
class Programs:
    """What generation runs, compiled; without a cache there is nothing after prefill.

    Attributes:
        prefill: (params, tokens, lengths) to (logits, cache).
        first: (logits, keys, sampling, eos, lengths) to the decode state, the cache left out.
        decode: (params, state, sampling, eos, limit) to the decode state.
    """

    prefill: Any
    first: Any
    decode: Any
    cache_bytes: int
    params_bytes: int


def compile_programs(setting: str, size: Size) -> Programs:
    """The programs of a setting, for shapes alone."""
    model, shape = make_model(size), jax.ShapeDtypeStruct
    params, lengths = param_shapes(model), shape((1,), jnp.int32)
    tokens = shape((1, size.tokens), jnp.int32)
    traced = prefill.trace(
        model, params, tokens, lengths, make_plan(setting, model, size), size.new_tokens
    )
    logits, cache = traced.out_info
    held = tree_bytes(cache), tree_bytes(params)
    compiled = traced.lower().compile()
    if not jax.tree.leaves(cache):
        return Programs(compiled, None, None, *held)
    sampling, keys = Sampling.create(0.0, 0, 1.0), jax.random.split(jax.random.key(0), 1)
    first = first_token.trace(logits, keys, sampling, NO_EOS, lengths, size.new_tokens)
    state, limit = replace(first.out_info, cache=cache), shape((), jnp.int32)
    steps = decode.trace(model, params, state, sampling, NO_EOS, limit)
    return Programs(compiled, first.lower().compile(), steps.lower().compile(), *held)


def tree_bytes(shapes: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def reserved(setting: str, size: Size) -> Row:
    """What XLA reserves."""
    programs = compile_programs(setting, size)
    of_prefill = memory_of(programs.prefill, programs.params_bytes)
    of_decode = None
    if programs.decode is not None:
        of_decode = memory_of(programs.decode, programs.params_bytes)
    peak = max(sum(asdict(part).values()) for part in (of_prefill, of_decode) if part is not None)
    return Row(setting, programs.params_bytes, programs.cache_bytes, of_prefill, of_decode, peak)


def memory_of(compiled: Any, params_bytes: int) -> Reserved:
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
    programs = compile_programs(setting, size)
    params, tokens, lengths = make_inputs(make_model(size), size)
    sampling, keys = Sampling.create(0.0, 0, 1.0), jax.random.split(jax.random.key(0), 1)
    jax.block_until_ready((params, tokens, lengths, keys))
    # What compilation has freed must not be lent to the programs.
    ctypes.CDLL(None).malloc_trim(0)
    before, start = resident("VmRSS"), time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    logits, cache = programs.prefill(params, tokens, lengths)
    if programs.decode is None:
        jax.block_until_ready(logits)
    else:
        state = programs.first(logits, keys, sampling, NO_EOS, lengths)
        state = replace(state, cache=cache)
        limit = jnp.asarray(size.new_tokens, jnp.int32)
        del cache
        jax.block_until_ready(programs.decode(params, state, sampling, NO_EOS, limit).output)
    return {
        "resident_before": before,
        "resident_growth": resident("VmHWM") - before,
        "seconds": round(time.perf_counter() - start, 1),
    }


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
        f"temporaries of prefill {mib(row.prefill.temporaries):6.1f}, "
        f"reserved {mib(row.reserved_peak):6.1f}, "
        f"resident {mib(row.resident_growth):6.1f} in {row.seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
