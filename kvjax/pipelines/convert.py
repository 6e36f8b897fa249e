"""Checkpoint in, converted checkpoint out."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.hf import load, save
from kvjax.pipelines.companions import bytes_per_token, copy_companions
from kvjax.transmla import convert

PROBE_TOKENS = 64


def convert_checkpoint(
    source: str, out: Path, method: str, init: str, rope_site: str, dtype: str
) -> dict[str, Any]:
    """Converts the checkpoint at `source` and writes it to `out` in the native layout.

    Returns:
        Method and settings, cache bytes a token before and after, parameters before and after, and
        the largest change of a logit on random tokens, relative to the largest logit.

    Raises:
        ValueError: `out` is not empty, or the conversion is not possible.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty, expected a new directory")
    start = time.monotonic()
    model, params = load(source, dtype=dtype)
    new_model, new_params = convert(model, params, method=method, init=init, rope_site=rope_site)
    save(new_model, new_params, out, layout="native")
    copy_companions(Path(model.config.source), out)
    return {
        "method": method,
        "init": init,
        "rope_site": rope_site,
        "bytes_per_token_before": bytes_per_token(model, dtype),
        "bytes_per_token_after": bytes_per_token(new_model, dtype),
        "parameters_before": count(params),
        "parameters_after": count(new_params),
        "relative_logit_change": logit_change(model, params, new_model, new_params),
        "seconds": round(time.monotonic() - start, 1),
    }


def count(params) -> int:
    """Number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def logit_change(model, params, new_model, new_params) -> float:
    """max |new − old| / max |old| over the logits of random tokens."""
    length = min(PROBE_TOKENS, model.config.context_length)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, model.config.vocab_size, (1, length)), jnp.int32)
    old, new = _logits(model, params, tokens), _logits(new_model, new_params, tokens)
    return float(jnp.max(jnp.abs(new - old)) / jnp.max(jnp.abs(old)))


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, tokens) -> jax.Array:
    return model.apply({"params": params}, tokens)[0]
