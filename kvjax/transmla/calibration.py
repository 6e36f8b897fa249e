"""Second moments of the keys, values and queries of a model on a text, in one streaming pass.

The closed form of `to_decoupled` needs only these moments. Its least squares need the text, so the
token ids are kept too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.checks import OVERFLOW, check_finite, check_params, first_not_finite, token_ids
from kvjax.config import GQAConfig
from kvjax.identity import identity
from kvjax.mesh import automatic_axes, on_automatic_mesh
from kvjax.nn import Transformer
from kvjax.nn.checks import check_fits
from kvjax.nn.transformer import Block, attention_input, block_kinds, embed, layer_output
from kvjax.paths import local_path, replacing
from kvjax.transmla.layer import Heads, attention_logits, attention_weights, gqa_layers, gqa_of

QUERY_ROWS = 128  # queries whose attention over all keys is in memory at a time
FORMAT = 3  # files of format 1 do not name the model; those of format 2 have no attended moments


@dataclass(frozen=True)
class LayerStats:
    """Means over the calibration tokens of one layer; fp64. Keys have QK-norm, but no RoPE.

    Attributes:
        kv_mean: E[x], [2·K·H], of x = [k of all KV heads ; v of all KV heads].
        kv_second: E[xᵀx], [2·K·H, 2·K·H].
        attended_mean, attended_second: the same means, but each token counts as much as the
            attention that it receives from all queries of all heads.
        q_second: E[qᵀq], [N, H, H], of every query head.
        distance: [T] share of the attention at every distance between query and key.
        input_second: E[yᵀy], [D, D], of the input of the attention; None unless requested.
    """

    kv_mean: Float[np.ndarray, " X"]
    kv_second: Float[np.ndarray, "X X"]
    attended_mean: Float[np.ndarray, " X"]
    attended_second: Float[np.ndarray, "X X"]
    q_second: Float[np.ndarray, "N H H"]
    distance: Float[np.ndarray, " T"]
    input_second: Float[np.ndarray, "D D"] | None = None


@dataclass(frozen=True)
class Stats:
    """A calibration: the moments of every layer and the text, for `to_decoupled`.

    Attributes:
        layers: one entry for each layer.
        tokens: int32 [S, T], the calibration text, which the least squares read again.
        model: digest of the identity of the model if `calibrate` wrote a file; else "".
    """

    layers: tuple[LayerStats, ...]
    tokens: Int[np.ndarray, "S T"]
    model: str = ""

    def save(self, path: str | Path) -> None:
        """Writes one .npz file atomically.

        Raises:
            ValueError: the path is a URL.
        """
        path = local_path(path, "the calibration")
        arrays: dict[str, Any] = {"format": FORMAT, "tokens": self.tokens, "model": self.model}
        for index, layer in enumerate(self.layers):
            for name, value in vars(layer).items():
                if value is not None:
                    arrays[f"{index}/{name}"] = value
        with replacing(path) as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> Stats:
        """Reads a file that `save` wrote.

        Raises:
            ValueError: a file of another kind, a URL, or moments that hold NaN.
        """
        path = local_path(path, "the calibration")
        try:
            with Path(path).open("rb") as raw, np.load(raw) as file:
                arrays = dict(file)
            if int(arrays.pop("format")) != FORMAT:
                raise ValueError(f"expected format {FORMAT}")
            tokens, model = arrays.pop("tokens"), str(arrays.pop("model"))
            parts: dict[int, dict[str, np.ndarray]] = {}
            for name, value in arrays.items():
                index, field = name.split("/")
                parts.setdefault(int(index), {})[field] = value
            layers = tuple(LayerStats(**parts[i]) for i in range(len(parts)))
            for index, layer in enumerate(layers):
                check_finite(vars(layer), f"layer {index}: ")
            return cls(layers, tokens, model)
        except (ValueError, KeyError, TypeError, OSError, EOFError, BadZipFile) as error:
            raise ValueError(f"{path} holds no calibration: {error}") from None


@automatic_axes()
def calibrate(
    model: Transformer,
    params: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    input_moments: bool = False,
    resume: str | Path | None = None,
) -> Stats:
    """Measures the moments of every layer over a stream of token batches.

    The products of a batch are summed on the device in fp32 at full precision, and those of all
    batches on the host in fp64. Memory is O(L·(2·K·H)²) plus the token ids.

    Examples:
        >>> stats = kvjax.transmla.calibrate(model, params, batches)
        >>> len(stats.layers) == model.config.num_layers
        True

    Args:
        model: with GQA in every layer.
        batches: int32 [B, T] without padding, with the same T in all batches.
        input_moments: measure E[yᵀy] of the input of the attention too, which `q_rank` needs.
        resume: a file that keeps the state after every batch. A run that was interrupted continues
            there if it gets the same batches.

    Raises:
        ValueError: no batch; batches of different lengths or with ids that the model does not
            have; layers without GQA; a `resume` that is a URL, or a file of other batches or of
            another model; moments that are not finite (the error names the weight, or the layer
            whose activations overflow).
    """
    check_fits(model, params)
    gqa_layers(model)  # raises ValueError for others
    owner = ""
    if resume is not None:
        resume = local_path(resume, "resume")
        owner = identity(model.config, params).digest
    state = Stats.load(resume) if resume is not None and resume.exists() else None
    if state is not None and state.model != owner:
        raise ValueError(
            f"{resume} holds the moments of another model: got {state.model or '–'}, expected "
            f"{owner}; give another file, or remove it"
        )
    rows = 0
    for batch in batches:
        tokens = _checked(model, batch, state)
        # Batches that the file has already are compared, not measured again.
        start, rows = rows, rows + len(tokens)
        if state is not None and start < len(state.tokens):
            if not np.array_equal(state.tokens[start:rows], tokens):
                raise ValueError(
                    f"{resume} holds the moments of other batches: give another file, or remove it"
                )
            continue
        new = _observe_batch(model, params, tokens, input_moments)
        state = dataclasses.replace(_add(state, new), model=owner)
        if resume is not None:
            state.save(resume)
    if state is None:
        raise ValueError("got no batch to calibrate on, expected at least one")
    if len(state.tokens) != rows:
        raise ValueError(
            f"{resume} holds the moments of {len(state.tokens)} sequences, the batches have "
            f"{rows}: give another file, or remove it"
        )
    return state


def _checked(model: Transformer, batch: Any, state: Stats | None) -> Int[np.ndarray, "B T"]:
    tokens = token_ids(batch, model.config.vocab_size, "calibration")
    if tokens.ndim != 2:
        raise ValueError(f"a calibration batch has shape {tokens.shape}, expected ids [B, T]")
    if state is not None and tokens.shape[1] != state.tokens.shape[1]:
        raise ValueError(
            f"a calibration batch has sequences of {tokens.shape[1]} tokens, expected "
            f"{state.tokens.shape[1]} as in the first"
        )
    return tokens


def _observe_batch(
    model: Transformer,
    params: Mapping[str, Any],
    tokens: Int[np.ndarray, "B T"],
    input_moments: bool,
) -> Stats:
    """The moments of one batch."""
    embedding = {"embedding": on_automatic_mesh(params["embedding"])}
    x, layers = embed(model.config, embedding, tokens), []
    for index, kind in enumerate(block_kinds(model.config)):
        own = on_automatic_mesh(params[f"layers_{index}"])
        moments = observe(kind.block, own, x, input_moments)
        check_moments(moments, index, params)
        layers.append(moments)
        x = layer_output(kind, own, x)
    return Stats(tuple(layers), tokens)


def observe(
    block: Block,
    params: dict[str, Any],
    x: Float[Array, "B T D"],
    input_moments: bool = False,
) -> LayerStats:
    """The moments of one layer.

    Args:
        block, params: the layer.
        x: the input of the block, before its norm.
        input_moments: as in `calibrate`.
    """
    means = _moments(block, input_moments, params, x)
    means = {name: np.asarray(value, np.float64) for name, value in means.items()}
    for name in ("kv", "attended"):
        mean = means[f"{name}_mean"]
        means[f"{name}_second"] += np.outer(mean, mean)
    return LayerStats(**means)


def check_moments(moments: LayerStats, index: int, params: Mapping[str, Any]) -> None:
    """Checks that the moments of a layer are finite.

    Args:
        index: number of the layer.
        params: of the model; searched for NaN if the moments are not finite.

    Raises:
        ValueError: names the first weight that holds NaN or, without one, the layer and the moment.
    """
    name = first_not_finite(vars(moments))
    if name is not None:
        check_params(params)
        raise ValueError(f"layer {index}: {name} is NaN or infinite, expected numbers: {OVERFLOW}")


def merge(old: LayerStats, new: LayerStats, share: float) -> LayerStats:
    """The moments over the tokens of both; `share` is the share of tokens in `new`."""
    names = [f.name for f in dataclasses.fields(LayerStats) if getattr(new, f.name) is not None]
    mixed = {n: (1 - share) * getattr(old, n) + share * getattr(new, n) for n in names}
    return LayerStats(**mixed)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _moments(
    block: Block,
    input_moments: bool,
    params: dict[str, Any],
    x: Float[Array, "B T D"],
) -> dict[str, jax.Array]:
    """The means with the names of `LayerStats`, in fp32; second moments are centred."""
    heads, base = Heads.of(block, params, x), gqa_of(block)
    kv = jnp.concatenate([heads.k, heads.v], axis=2).astype(jnp.float32)
    kv = kv.reshape(-1, 2 * base.num_kv_heads * base.head_dim)
    q = heads.q.astype(jnp.float32).reshape(-1, base.num_heads, base.head_dim)
    distance, received = _attention(heads.rotated(base), base)
    kv_mean, kv_second = _centred(kv, jnp.ones(len(kv), jnp.float32))
    attended_mean, attended_second = _centred(kv, received.reshape(-1))
    # The attention of every query of every head sums to 1.
    means = {
        "kv_mean": kv_mean,
        "kv_second": kv_second,
        "attended_mean": attended_mean,
        "attended_second": attended_second,
        "q_second": _product("tnh,tng->nhg", q, q) / len(q),
        "distance": distance / (len(q) * base.num_heads),
    }
    if input_moments:
        y = attention_input(block, params, x).astype(jnp.float32).reshape(-1, x.shape[-1])
        means["input_second"] = _product("td,te->de", y, y) / len(y)
    return means


def _centred(
    x: Float[Array, "M X"], weights: Float[Array, " M"]
) -> tuple[Float[Array, " X"], Float[Array, "X X"]]:
    """The weighted mean and covariance of rows.

    The mean is subtracted before the products are rounded: a bias a thousand times larger than the
    differences between tokens would hide them in fp32.
    """
    share = weights / jnp.sum(weights)
    mean = jnp.sum(share[:, None] * x, axis=0)
    centred = jnp.sqrt(share)[:, None] * (x - mean[None])
    return mean, _product("tx,ty->xy", centred, centred)


def _product(pattern: str, a: jax.Array, b: jax.Array) -> jax.Array:
    # The default on TPUs and GPUs rounds the factors to 8 or 10 bits (bfloat16, TF32).
    return jnp.einsum(pattern, a, b, precision=jax.lax.Precision.HIGHEST)


def _attention(heads: Heads, base: GQAConfig) -> tuple[Float[Array, " T"], Float[Array, "B T"]]:
    """Attention at every distance between query and key, and attention that every key receives.

    Both are sums over queries and heads; the distances also over sequences.
    """
    B, T = heads.q.shape[:2]
    rows = min(QUERY_ROWS, T)

    def add(tile: jax.Array, total: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        start = jnp.minimum(tile * rows, T - rows)
        at = start + jnp.arange(rows, dtype=jnp.int32)
        q = jax.lax.dynamic_slice_in_dim(heads.q, start, rows, 1)
        weights = attention_weights(attention_logits(q, heads.k, base.scale), at, base)
        # The last tile overlaps the one before it; queries that were counted count as 0.
        fresh = (at >= tile * rows)[:, None].astype(jnp.float32)
        mass = jnp.sum(weights, axis=1) * fresh[None]
        distance = at[:, None] - jnp.arange(T, dtype=jnp.int32)[None]
        slots = jnp.where(distance >= 0, distance, T)
        distances = total[0].at[slots].add(jnp.sum(mass, axis=0), mode="drop")
        return distances, total[1] + jnp.sum(mass, axis=1)

    zeros = jnp.zeros((T,), jnp.float32), jnp.zeros((B, T), jnp.float32)
    return jax.lax.fori_loop(0, -(-T // rows), add, zeros)


def _add(old: Stats | None, new: Stats) -> Stats:
    """The calibration on the texts of both."""
    if old is None:
        return new
    share = new.tokens.size / (old.tokens.size + new.tokens.size)
    layers = tuple(merge(a, b, share) for a, b in zip(old.layers, new.layers, strict=True))
    return Stats(layers, np.concatenate([old.tokens, new.tokens]))
