"""What smaller cache entries cost: perplexity and bytes of texts that are fed to a cache.

    python -m benchmarks.entries MODEL TEXT [MODEL TEXT …] [--out benchmarks/results/entries.json]

A model reads the first --prompt tokens of each text, and its cache keeps them in each format. The
other tokens are fed one at a time, so that each is stored before the next is judged. Every judged
token sees only stored entries. A text is a file of token ids [·, tokens] (.npy), or a plain or gzip
file, of which consecutive parts of the second half are taken. Bytes are of all arrays of the cache,
room for new tokens included.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import kvjax
from benchmarks.environment import environment
from kvjax.cache import cache_bytes
from kvjax.paths import local_path
from kvjax.policies.budgets import token_bytes
from kvjax.text_files import read_bytes
from pallas_kernels.entries import DTYPES


@dataclass(frozen=True)
class Row:
    """One model under one policy.

    Attributes:
        nats: mean loss of a judged token.
        more: how much larger the perplexity is than under the same policy with plain entries,
            a share, and its standard error over the texts.
        token_bytes: of a token's keys and values in all layers.
        cache_bytes: of one text's cache.
    """

    model: str
    policy: str
    entries: str
    nats: float
    perplexity: float
    more: float
    more_error: float
    token_bytes: int
    cache_bytes: int
    cpu_seconds: float


def main() -> None:
    args = arguments()
    sizes = {name: getattr(args, name) for name in ("texts", "tokens", "prompt", "dtype")}
    rows, facts = [], environment("benchmarks.entries")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for model, text in zip(args.pairs[::2], args.pairs[1::2], strict=True):
        for row in measure(model, text, args):
            print(row, flush=True)
            rows.append(asdict(row))
            # A run that is stopped leaves the rows that it has.
            result = {"what": "cache entries", **sizes, "rows": rows, **facts}
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {args.out}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", nargs="+", help="models, each followed by its text")
    parser.add_argument("--out", type=local_path, default=Path("benchmarks/results/entries.json"))
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--policies", nargs="+", default=["full", "snapkv:ratio=0.5"])
    parser.add_argument("--entries", nargs="+", default=list(DTYPES))
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    if len(args.pairs) % 2:
        parser.error(f"got {len(args.pairs)} names, expected a text after each model")
    return args


def measure(path: str, text: str, args: argparse.Namespace):
    """The rows of one model."""
    model, params = kvjax.load(path, dtype=args.dtype)
    ids = read_texts(path, Path(text), args.texts, args.tokens)
    for policy in args.policies:
        plain = None
        for entries in ("", *args.entries):
            began, sign = time.process_time(), "," if ":" in policy else ":"
            name = f"{policy}{sign}entries={entries}" if entries else policy
            losses, nbytes = fed(model, params, ids, args.prompt, name)
            plain = losses if plain is None else plain
            change, stored = losses - plain, DTYPES.get(entries, args.dtype)
            yield Row(
                model=Path(path).name,
                policy=policy,
                entries=entries or args.dtype,
                nats=round(float(losses.mean()), 5),
                perplexity=round(math.exp(losses.mean()), 3),
                more=round(math.expm1(change.mean()), 5),
                more_error=round(float(change.std(ddof=1)) / len(losses) ** 0.5, 5),
                token_bytes=sum(
                    token_bytes(each.attention, stored) for each in model.config.layers
                ),
                cache_bytes=nbytes // len(losses),
                cpu_seconds=round(time.process_time() - began, 1),
            )


def read_texts(model: str, path: Path, count: int, length: int) -> Int[np.ndarray, "B T"]:
    """Token ids: the first rows of a .npy file, or consecutive parts of a text's second half."""
    if path.suffix == ".npy":
        return np.load(path)[:count, :length].astype(np.int32)
    text = read_bytes(path).decode("utf-8")
    text = text[len(text) // 2 :][: 12 * count * length]
    tokenizer = kvjax.load_tokenizer(model)
    ids = np.asarray(tokenizer.encode(text, add_special_tokens=False), np.int32)
    return ids[: count * length].reshape(count, length)


def fed(
    model, params, ids: Int[np.ndarray, "B T"], prompt: int, policy: str
) -> tuple[Float[np.ndarray, " B"], int]:
    """Mean loss of each text's tokens after the prompt's next one, and the bytes of the cache."""
    (B, T), losses = ids.shape, []
    lengths = np.full(B, prompt, np.int32)
    settings = {"policy": policy, "max_new_tokens": T - prompt}
    _, cache = kvjax.prefill(model, params, ids[:, :prompt], lengths, **settings)
    nbytes = cache_bytes(cache)
    for at in range(prompt, T - 1):
        logits, cache = kvjax.decode_step(model, params, cache, jnp.asarray(ids[:, at]))
        losses.append(token_losses(logits, jnp.asarray(ids[:, at + 1])))
    return np.mean(np.asarray(losses), axis=0), nbytes


@jax.jit
def token_losses(logits: Float[Array, "B V"], wanted: Int[Array, " B"]) -> Float[Array, " B"]:
    """−log p of the wanted tokens."""
    logs = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.take_along_axis(logs, wanted[:, None], axis=1)[:, 0]


if __name__ == "__main__":
    main()
