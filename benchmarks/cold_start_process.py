"""What a process of `benchmarks.cold_start` does: write a model, or call `generate` and watch.

The result is the last line of standard output, as JSON. Dispatch is synchronous: a program that
runs would otherwise be counted for the next one that is compiled.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

import kvjax
from benchmarks.compile_spans import Span, watched
from kvjax.hf import config_from_hf
from kvjax.nn import Transformer, param_shapes

SMOL = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100_000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
LATENT = {"kv_rank": 96, "rope_dim": 32}
"""Of the conversion: a third of the 384 numbers that a layer caches for a token."""

CALIBRATION = (8, 128)
FIRST = {"prompt": 1000, "max_new_tokens": 32}
SAME_SCORER = {
    "full": "snapkv:kv_size=64",
    "snapkv": "pyramidkv:kv_size=64",
    "headkv": "spankv:kv_size=64",
    "adasnapkv": "snapkv:kv_size=64",
}
"""The other policy of a process. "full" has no scorer: there it is the first that has one."""


@dataclass(frozen=True)
class Call:
    """What one call of `generate` cost, in processor seconds.

    Attributes:
        call: what differs from the first call.
        cpu_s: of the whole call.
        to_first_tokens_s: from its beginning to the first tokens that it hands out.
        trace_s, lower_s, compile_s, read_s: of programs. `compile_s` includes writing to the
            persistent cache, `read_s` is reading from it.
        run_s: the rest of `cpu_s`.
        compiled, read: programs that XLA compiled, and that the persistent cache had.
        names: of the programs compiled, with their number, the costliest first.
    """

    call: str
    policy: str
    prompt: int
    max_new_tokens: int
    cpu_s: float
    to_first_tokens_s: float
    trace_s: float
    lower_s: float
    compile_s: float
    read_s: float
    run_s: float
    compiled: int
    read: int
    names: dict[str, int]


def write(kind: str, layers: int, model: str, **_: Any) -> None:
    """Saves a random model, in the kind asked for."""
    rng = np.random.default_rng(0)
    source, params = random_model(layers, rng)
    if kind == "decoupled":
        tokens = rng.integers(0, SMOL["vocab_size"], CALIBRATION, np.int32)
        stats = kvjax.transmla.calibrate(source, params, [tokens])
        source, params = kvjax.transmla.convert(
            source, params, method="decoupled", stats=stats, **LATENT
        )
    kvjax.save(source, params, model)


def random_model(layers: int, rng: np.random.Generator) -> tuple[Transformer, Any]:
    """A random llama of SmolLM2-135M's shape, float32."""
    model = Transformer(config_from_hf(SMOL | {"num_hidden_layers": layers}))
    params = jax.tree.map_with_path(
        lambda path, leaf: random_weight(rng, path[-1].key, leaf.shape), param_shapes(model.config)
    )
    return model, params


def random_weight(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> jax.Array:
    """Norms of one; other weights keep the size of what they multiply."""
    if "norm" in name:
        return jax.numpy.ones(shape, jax.numpy.float32)
    noise = rng.standard_normal(shape, np.float32)
    return jax.numpy.asarray(noise / np.sqrt(SMOL["hidden_size"]))


def calls(model: str, policy: str, only_first: bool) -> dict[str, Any]:
    """The costs of importing and loading, and those of the calls."""
    imports = time.process_time()
    transformer, params = kvjax.load(model, dtype="float32")
    load = time.process_time() - imports
    scores = random_scores(transformer.config.num_layers, Path(model))
    made = [
        measured(transformer, params, name, settings, scores)
        for name, settings in changes(policy, only_first).items()
    ]
    return {"imports_s": imports, "load_s": load, "calls": [asdict(call) for call in made]}


def random_scores(layers: int, directory: Path) -> Path:
    """A score file for HeadKV's policies, beside the model."""
    path = directory / "random_scores.json"
    samples = np.random.default_rng(1).exponential(size=(layers, SMOL["num_attention_heads"], 4))
    kvjax.headkv.HeadScores(samples).save(path)
    return path


def changes(policy: str, only_first: bool) -> dict[str, dict[str, Any]]:
    """Name → settings of each call; the numbers that change stay within their buckets."""
    first = FIRST | {"policy": policy}
    found = {"first": first, "second": first}
    if only_first:
        return found
    found["other policy"] = first | {"policy": SAME_SCORER[policy.partition(":")[0]]}
    if "kv_size=64" in policy:
        found["other KV size"] = first | {"policy": policy.replace("64", "63")}
    found["other max_new_tokens"] = first | {"max_new_tokens": 24}
    found["other prompt length"] = first | {"prompt": 900}
    return found


def measured(
    model: Transformer, params: Any, name: str, settings: dict[str, Any], scores: Path
) -> Call:
    """One call of `generate`."""
    prompt, new, policy = (settings[key] for key in ("prompt", "max_new_tokens", "policy"))
    tokens = np.random.default_rng(2).integers(0, SMOL["vocab_size"], prompt).tolist()
    given = f"{policy},scores={scores}" if policy.startswith("headkv") else policy
    arrived: list[float] = []
    with watched() as spans:
        start = time.process_time()
        kvjax.generate(
            model,
            params,
            [tokens],
            max_new_tokens=new,
            policy=given,
            eos_ids=(),
            on_tokens=lambda *_: arrived.append(time.process_time() - start),
        )
        cpu = time.process_time() - start
    seconds = {
        stage: sum(span.cpu_s for span in spans if span.stage == stage)
        for stage in ("trace", "lower", "compile", "read")
    }
    names = names_of("compile", spans)
    return Call(
        call=name,
        policy=policy,
        prompt=prompt,
        max_new_tokens=new,
        cpu_s=cpu,
        to_first_tokens_s=arrived[0],
        run_s=cpu - sum(seconds.values()),
        compiled=names.total(),
        read=names_of("read", spans).total(),
        names=dict(names),
        **{f"{stage}_s": value for stage, value in seconds.items()},
    )


def names_of(stage: str, spans: list[Span]) -> Counter[str]:
    """How often a stage met each name, the costliest first."""
    ordered = sorted(spans, key=lambda span: -span.cpu_s)
    return Counter(span.name for span in ordered if span.stage == stage)


def main() -> None:
    task, settings = sys.argv[1], json.loads(sys.argv[2])
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    print(json.dumps({"write": write, "calls": calls}[task](**settings)))


if __name__ == "__main__":
    main()
