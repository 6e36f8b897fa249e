"""A policy of your own: a scorer that rates tokens, and an allocator that divides the budget."""

import jax
import jax.numpy as jnp
import numpy as np

import kvjax
from kvjax.policies import Compress, LayerView, Request, Uniform


def small_keys(view: LayerView) -> jax.Array:
    """[B, K, S], higher for tokens to keep: −‖key‖ (KNorm, arXiv 2406.11430)."""
    return -jnp.linalg.norm(view.keys.astype(jnp.float32), axis=-1)


def ends_first(request: Request) -> np.ndarray:
    """[L, K] whole tokens: the first and the last layer get twice as many as the others."""
    weights = np.ones((request.num_layers, request.num_kv_heads))
    weights[[0, -1]] = 2
    return np.minimum(request.budget * weights // weights.mean(), request.limit).astype(np.int32)


def main() -> dict[str, kvjax.Generation]:
    """Asks the embedded model a question, under these policies and two built-in ones."""
    model, params = kvjax.load("builtin:needle", dtype="float32")
    tokenizer = kvjax.load_tokenizer("builtin:needle")
    [example] = kvjax.tasks.make_examples("needle", kvjax.tasks.WordVocabulary(), 1, length=256)
    policies = {
        "small keys": Compress(Uniform(), small_keys, kv_size=24),
        "small keys, ends first": Compress(ends_first, small_keys, kv_size=24),
        "snapkv": "snapkv:kv_size=24",
        "full": "full",
    }
    found = {}
    for name, policy in policies.items():
        out = kvjax.generate(model, params, [example.prompt], max_new_tokens=13, policy=policy)
        print(f"{name:23}{out.cache_bytes:8,} bytes: {tokenizer.decode(out.tokens[0])}")
        found[name] = out
    return found


if __name__ == "__main__":
    main()
