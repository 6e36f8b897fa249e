"""A checkpoint → its equal-cache conversion, read, converted and written layer by layer."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.config import LayerConfig, ModelConfig
from kvjax.finite import CONVERTED, OVERFLOW, check_finite, first_not_finite
from kvjax.hf import matching, open_params, read_model
from kvjax.mesh import named_mesh
from kvjax.nn import Transformer
from kvjax.nn.transformer import block_kind, embed, hidden_logits, layer_output, output_params
from kvjax.pipelines.companions import bytes_per_token, peak_memory
from kvjax.pipelines.unfinished import Output, check_out, describe
from kvjax.sharding import param_shapes
from kvjax.transmla.equal_cache import checked_inits, equal_cache_layer
from kvjax.transmla.layer import gqa_layers

PROBE_TOKENS = 64
STREAMS = ("original", "converted")


def convert_checkpoint(
    source: str,
    out: Path,
    method: str,
    init: str,
    rope_site: str,
    dtype: str,
    mesh: str | None = None,
) -> dict[str, Any]:
    """Converts the checkpoint at `source` and writes it to `out` in the native layout.

    One layer's parameters exist at a time, and then one of the matrices of the vocabulary. The same
    call after it was stopped goes on behind the last layer that was written.

    Args:
        mesh: devices that each layer is spread over, see `kvjax.mesh.parse_mesh`; None for one.

    Returns:
        Method and settings, cache bytes a token before and after, parameters before and after, the
        largest change of a logit on random tokens, relative to the largest logit, seconds, and the
        process's peak memory.

    Raises:
        ValueError: `out` is not empty, or holds an unfinished conversion with other settings; the
            conversion is not possible; or weights or logits hold NaN.
    """
    start = time.monotonic()
    check_out(out)
    model = read_model(source)
    inits = checked_inits(init, None, rope_site)
    gqa_layers(model)
    settings = {"method": method, "init": init, "rope_site": rope_site}
    params = open_params(source, dtype, named_mesh(mesh))
    model = matching(model, params)
    with Output(out, settings | describe(model, params, dtype)) as output:
        _write_layers(model, params, output, inits, rope_site)
        top = write_top(model, params, output)
        streams = output.finished.streams
        change = relative_change(
            *(hidden_logits(model.config, top, streams[name]) for name in STREAMS)
        )
        new_model = output.complete(model, model.config.source)
    return {
        **settings,
        "bytes_per_token_before": bytes_per_token(model, dtype),
        "bytes_per_token_after": bytes_per_token(new_model, dtype),
        "parameters_before": count(param_shapes(model)),
        "parameters_after": count(param_shapes(new_model)),
        "relative_logit_change": change,
        "seconds": round(time.monotonic() - start, 1),
        "peak_memory_bytes": peak_memory(),
    }


def _write_layers(
    model: Transformer, params: Mapping[str, Any], output: Output, inits: Any, rope_site: str
) -> None:
    """Converts and writes the layers that are not finished, random tokens through both models."""
    streams = output.finished.streams
    if not output.finished.attention:
        streams = dict.fromkeys(STREAMS, embed(model.config, params, probe_tokens(model.config)))
    for index in range(len(output.finished.attention), model.config.num_layers):
        own, layer = params[f"layers_{index}"], model.config.layers[index]
        check_finite(own, f"layers_{index}/")
        base = gqa_layers(model)[index]
        config, attn = equal_cache_layer(index, base, own["attn"], inits, rope_site)
        check_finite(attn, f"layers_{index}/attn/", CONVERTED)
        new, new_own = LayerConfig(config, layer.mlp), {**own, "attn": attn}
        streams = {
            "original": layer_output(block_kind(model.config, layer), own, streams["original"]),
            "converted": layer_output(block_kind(model.config, new), new_own, streams["converted"]),
        }
        output.write_layer(new_own, config, streams)
        del own, attn, new_own  # before the next one is read


def write_top(model: Transformer, params: Mapping[str, Any], output: Output) -> dict[str, Any]:
    """Writes what belongs to no layer, one after the other; gives back what makes the logits."""
    needed, kept = output_params(model.config), {}
    names = [name for name in params if not name.startswith("layers_")]
    for name in sorted(names, key=lambda name: name in needed):
        value = params[name]
        check_finite({name: value})
        output.write_top(name, value)
        if name in needed:
            kept[name] = value
        del value
    return kept


def count(params) -> int:
    """Number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def probe_tokens(config: ModelConfig) -> np.ndarray:
    """Random tokens [1, T] int32, always the same ones."""
    length = min(PROBE_TOKENS, config.context_length)
    return np.random.default_rng(0).integers(0, config.vocab_size, (1, length)).astype(np.int32)


def logit_change(model, params, new_model, new_params) -> float:
    """max |new − old| / max |old| over the logits of random tokens."""
    tokens = jnp.asarray(probe_tokens(model.config))
    models = (model, params), (new_model, new_params)
    return relative_change(*(m.apply({"params": p}, tokens)[0] for m, p in models))


def relative_change(old: jax.Array, new: jax.Array) -> float:
    """max |new − old| / max |old|.

    Raises:
        ValueError: logits that are not finite.
    """
    for name, logits in (("original", old), ("converted", new)):
        if first_not_finite(logits) is not None:
            raise ValueError(f"the {name} model's logits are NaN or infinite: {OVERFLOW}")
    return float(jnp.max(jnp.abs(new - old)) / jnp.max(jnp.abs(old)))
