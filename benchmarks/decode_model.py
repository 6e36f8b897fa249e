"""Decode of a random Llama-3-8B-shaped model: a dense cache, and as many entries in head budgets.

    python -m benchmarks.decode_model [--layers 32] [--out benchmarks/results/decode_model.json]

Steps of one token each, greedy, in one compiled loop over a donated cache, with the implementation
that the device gives. All settings hold as many entries, evenly in a dense cache, evenly in a pool,
or skewed in a pool as HeadKV's budgets are. They take turns. Fewer layers where memory is short.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.environment import environment
from benchmarks.pools import held_pool
from kvjax.cache import DenseCache, ModelCache, cache_bytes
from kvjax.config import GQAConfig, LayerConfig, MLPConfig, ModelConfig, RopeConfig
from kvjax.nn import Transformer, param_shapes
from kvjax.paths import local_path
from pallas_kernels import api
from pallas_kernels.bench.cases import head_budgets


@dataclass(frozen=True)
class Size:
    """Llama-3-8B's numbers, but for the layers (and, on a CPU, the vocabulary)."""

    layers: int
    batch: int
    context: int
    steps: int
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    mlp: int = 14336
    vocab: int = 128_256


@dataclass(frozen=True)
class Row:
    """One setting.

    Attributes:
        cache_bytes: of all layers.
        milliseconds: of a step, the median.
        of_dense: milliseconds, of the dense cache's in the same run.
    """

    setting: str
    cache_bytes: int
    milliseconds: float
    of_dense: float
    all_milliseconds: list[float]


def main() -> None:
    args = arguments()
    size = Size(args.layers, args.batch, args.context, args.steps, vocab=args.vocab)
    rows = measure(size, args.dtype, args.repeats)
    on = api.target()
    result = {
        "what": "one decode step of a random model",
        "device": on.device_kind,
        "size": asdict(size),
        "dtype": args.dtype,
        "rows": [asdict(row) for row in rows],
        **environment("benchmarks.decode_model"),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {args.out}")


def arguments() -> argparse.Namespace:
    """A small model and few steps by default where the device is a CPU."""
    cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=local_path, default=Path("benchmarks/results/decode_model.json")
    )
    parser.add_argument("--layers", type=int, default=1 if cpu else 32)
    parser.add_argument("--batch", type=int, default=1 if cpu else 16)
    parser.add_argument("--context", type=int, default=1024 if cpu else 8192)
    parser.add_argument("--steps", type=int, default=4 if cpu else 64)
    parser.add_argument("--vocab", type=int, default=8192 if cpu else Size.vocab)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", default="bfloat16")
    return parser.parse_args()


def measure(size: Size, dtype: str, repeats: int) -> list[Row]:
    """Every setting, in turns."""
    model = Transformer(model_config(size))
    params = random_params(model, dtype)
    caches = {name: make(size, dtype) for name, make in SETTINGS.items()}
    sizes = {name: cache_bytes(cache) for name, cache in caches.items()}
    run = jax.jit(decode, static_argnames=("model", "steps"), donate_argnames="cache")
    tokens = jnp.zeros((size.batch, 1), jnp.int32)
    times: dict[str, list[float]] = {name: [] for name in caches}
    for turn in range(repeats + 1):
        for name in caches:
            fresh = SETTINGS[name](size, dtype)
            caches[name] = None  # one cache of a setting at a time
            start = time.perf_counter()
            caches[name] = jax.block_until_ready(run(model, params, tokens, fresh, size.steps))
            if turn:  # the first call compiles
                times[name].append((time.perf_counter() - start) / size.steps * 1e3)
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows = [
        Row(name, sizes[name], medians[name], medians[name] / medians["dense"], times[name])
        for name in caches
    ]
    for row in rows:
        print(f"{row.setting:16} {row.milliseconds:9.2f} ms a step  {row.of_dense:5.2f} × dense")
    return rows


def decode(model: Transformer, params: Any, tokens: jax.Array, cache: Any, steps: int) -> Any:
    """The cache after `steps` greedy tokens."""

    def step(_: Any, state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        tokens, cache = state
        out: Any = model.apply({"params": params}, tokens, cache=cache)
        logits, cache = out
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

    return jax.lax.fori_loop(0, steps, step, (tokens, cache))[1]


def dense(size: Size, dtype: str) -> list[DenseCache]:
    """Full but for the steps that are to come."""

    def layer() -> DenseCache:
        rows = -(-(size.context + size.steps) // 64) * 64
        cache = DenseCache.create(
            size.batch, size.kv_heads, rows, size.head_dim, size.head_dim, dtype
        )
        return dataclasses.replace(cache, lengths=jnp.full((size.batch,), size.context, jnp.int32))

    return [layer() for _ in range(size.layers)]


def pools(size: Size, dtype: str, budgets: str) -> ModelCache:
    """As many entries in a pool of all layers."""
    counts = head_budgets(size.kv_heads, size.context, budgets)
    held = np.broadcast_to(counts, (size.layers, size.kv_heads))
    return held_pool(model_config(size), held, size.context, size.steps, size.batch, dtype)


SETTINGS: dict[str, Callable[[Size, str], Any]] = {
    "dense": dense,
    "pool, uniform": lambda size, dtype: pools(size, dtype, "uniform"),
    "pool, skewed": lambda size, dtype: pools(size, dtype, "skewed"),
}


def model_config(size: Size) -> ModelConfig:
    """Llama-3-8B with `size.layers` layers."""
    attention = GQAConfig(
        size.heads,
        size.kv_heads,
        size.head_dim,
        size.head_dim**-0.5,
        RopeConfig(size.head_dim, 500_000.0),
    )
    layer = LayerConfig(attention, MLPConfig(size.mlp))
    return ModelConfig("llama", size.vocab, size.hidden, (layer,) * size.layers)


def random_params(model: Transformer, dtype: str) -> Any:
    """Small random weights, made on the device, a leaf at a time."""
    leaves, tree = jax.tree.flatten(param_shapes(model.config))
    make = jax.jit(
        lambda key, shape: (0.02 * jax.random.normal(key, shape)).astype(dtype), static_argnums=1
    )
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten([make(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)])


if __name__ == "__main__":
    main()
