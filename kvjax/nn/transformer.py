"""The decoder-only transformer: embeddings, blocks of attention and MLP, output logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from kvjax.cache import NoCache, with_layer
from kvjax.config import (
    AttentionConfig,
    DecoupledConfig,
    EqualCacheConfig,
    GQAConfig,
    LayerConfig,
    MLAConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
)
from kvjax.mesh import automatic_axes, on_automatic_mesh
from kvjax.nn.decoupled import DecoupledAttention
from kvjax.nn.equal_cache import EqualCacheAttention
from kvjax.nn.gqa import GQA, norm_weight
from kvjax.nn.matmul import matmul
from kvjax.nn.mla import MLA
from kvjax.nn.mlp import MLP, MoE
from kvjax.nn.norm import rms_norm
from kvjax.nn.params import declare

ATTENTION = {
    GQAConfig: GQA,
    EqualCacheConfig: EqualCacheAttention,
    MLAConfig: MLA,
    DecoupledConfig: DecoupledAttention,
}
MLPS = {MLPConfig: MLP, MoEConfig: MoE}


class Block(nn.Module):
    """x + attention, then x + MLP, with the norms that the model has."""

    config: ModelConfig
    layer: LayerConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        cache: Any,
        lengths_B: Int[Array, " B"],
    ) -> tuple[Float[Array, "B T D"], Any]:
        """One layer; see `Transformer.__call__`."""
        c = self.config
        attention = ATTENTION[type(self.layer.attention)](self.layer.attention, name="attn")
        mlp = MLPS[type(self.layer.mlp)](self.layer.mlp, name="mlp")
        y, cache = attention(
            self._norm("attn_pre_norm", x_BTD, c.pre_norm), positions_BT, cache, lengths_B
        )
        x_BTD = x_BTD + self._norm("attn_post_norm", y, c.post_norm)
        y = mlp(self._norm("mlp_pre_norm", x_BTD, c.pre_norm))
        return x_BTD + self._norm("mlp_post_norm", y, c.post_norm), cache

    def _norm(self, name: str, x: jax.Array, present: bool) -> jax.Array:
        if not present:
            return x
        weight = norm_weight(self, name, x.shape[-1], self.config.norm)
        return rms_norm(x, weight, self.config.norm)


class Transformer(nn.Module):
    """A causal language model; parameters are a plain nested dict, caches are arguments.

    >>> logits, _ = model.apply({"params": params}, tokens)
    >>> cache = model.init_cache(batch_size, max_len)
    >>> logits, cache = model.apply({"params": params}, tokens, cache=cache)
    """

    config: ModelConfig

    def setup(self):
        c = self.config
        shape, axes = (c.vocab_size, c.hidden_size), ("vocab", "embed")
        self.embedding = declare(self, "embedding", shape, axes, init=nn.initializers.normal(0.02))
        self.layers = [Block(c, layer) for layer in c.layers]
        self.final_norm = norm_weight(self, "final_norm", c.hidden_size, c.norm)
        if not c.tie_embeddings:
            self.lm_head = declare(self, "lm_head", shape[::-1], axes[::-1])

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        cache: Any = None,
        *,
        rope_lengths: Int[Array, " B"] | None = None,
        segments: Int[Array, "B T"] | None = None,
        logits_at: str = "all",
    ) -> tuple[Float[Array, "B O V"], Any]:
        """Next-token logits.

        Args:
            tokens: [B, T] int32.
            positions: [B, T] int32; −1 marks padding (on the right), neither stored nor
                attended. None: 0 … T−1 without a cache, each sequence's own length onward with
                one.
            cache: from `init_cache`, one entry a layer; None for a full causal forward.
            rope_lengths: [B] whole lengths, for RoPE rules that depend on the length. None: the
                last position + 1 without a cache, the cache's capacity with one.
            segments: [B, T] int32, without a cache only: the number of the document that each
                token belongs to, where several are packed into a row. Tokens attend within their
                own; positions (and so RoPE) should restart in each.
            logits_at: "all", or "last" for the last token that is no padding only.

        Returns:
            Logits [B, T, V] fp32 ([B, 1, V] for "last"), and the cache with the new entries,
            None without one. The cache that was passed must not be used again if it was donated.

        Raises:
            ValueError: outside jit, more tokens than the cache has room for. Inside jit the
                surplus is dropped and the cache's lengths exceed its capacity. Segments together
                with a cache. Tokens that are no integer array of two dimensions.
        """
        if logits_at not in ("all", "last"):
            raise ValueError(f"logits_at is {logits_at!r}, expected 'all' or 'last'")
        if segments is not None and cache is not None:
            raise ValueError("got segments and a cache, expected packed documents without a cache")
        check_tokens(tokens)
        at = self._positions(tokens, positions, cache)
        if rope_lengths is None:
            rope_lengths = default_rope_lengths(at, cache)
        x = self.embed(tokens)
        for index in range(self.config.num_layers):
            entry = NoCache(segments) if cache is None else cache[index]
            x, entry = self.layer(index, x, at, entry, rope_lengths)
            if cache is not None:
                cache = with_layer(cache, index, entry)
        if logits_at == "last":
            x = last_valid(x, at)
        return self.unembed(x), cache

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Input embeddings."""
        return embed_tokens(self.config, self.embedding, tokens)

    def layer(
        self,
        index: int,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        cache: Any,
        rope_lengths: Int[Array, " B"],
    ) -> tuple[Float[Array, "B T D"], Any]:
        """One block, for callers that go layer by layer (`apply(…, method="layer")`)."""
        return self.layers[index](x, positions, cache, rope_lengths)

    def unembed(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Final norm and output logits, fp32."""
        weight = self.embedding.T if self.config.tie_embeddings else self.lm_head
        return output_logits(self.config, self.final_norm, weight, x)

    @nn.nowrap
    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """As `nn.Module.apply`; arrays may also lie on a mesh with explicit axes."""
        with automatic_axes():
            variables, args, kwargs = on_automatic_mesh((variables, args, kwargs))
            return super().apply(variables, *args, **kwargs)

    @nn.nowrap
    def init(self, *args: Any, **kwargs: Any) -> Any:
        """As `nn.Module.init`, with plain arrays: sharding metadata is kvjax.sharding's matter."""
        return nn.meta.unbox(super().init(*args, **kwargs))

    def init_cache(self, batch_size: int, max_len: int, dtype: Any = "bfloat16") -> list[Any]:
        """Empty caches, one a layer, for `max_len` tokens in each of `batch_size` sequences."""
        if batch_size < 1 or max_len < 1:
            raise ValueError(f"got batch_size {batch_size} and max_len {max_len}, expected ≥ 1")
        return [
            init_layer_cache(layer.attention, batch_size, max_len, dtype)
            for layer in self.config.layers
        ]

    def _positions(self, tokens, positions, cache):
        if positions is None:
            steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
            if cache is None:
                return jnp.broadcast_to(steps, tokens.shape)
            positions = cache[0].lengths[:, None] + steps
        if cache is not None:
            check_room(cache, positions)
        return positions


def check_tokens(tokens: Any) -> None:
    """Raises ValueError for what is no integer array [B, T]."""
    if getattr(tokens, "ndim", 0) != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        kind = (
            f"{tokens.dtype} {tokens.shape}" if hasattr(tokens, "dtype") else type(tokens).__name__
        )
        raise ValueError(f"got tokens {kind}, expected an integer array [B, T]")


def embed_tokens(
    config: ModelConfig, embedding: Float[Array, "V D"], tokens: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Input embeddings."""
    if tokens.size == 1:
        # One row is a slice, for which XLA:GPU hands a table that devices share to each of them
        # whole (1 GB a step for Llama-3-8B). Of two rows it sends the rows.
        x = jnp.take(embedding, jnp.concatenate([tokens, tokens]), axis=0)[:1]
    else:
        x = jnp.take(embedding, tokens, axis=0)
    # Gemma rounds the factor to the activations' dtype.
    return x * jnp.asarray(config.embedding_scale, x.dtype)


def output_logits(
    config: ModelConfig,
    final_norm: Float[Array, " D"],
    weight: Float[Array, "D V"],
    x: Float[Array, "B T D"],
) -> Float[Array, "B T V"]:
    """Final norm and output logits, fp32."""
    logits = matmul(rms_norm(x, final_norm, config.norm), weight, jnp.float32)
    if config.final_softcap is not None:
        logits = config.final_softcap * jnp.tanh(logits / config.final_softcap)
    return logits


def output_params(config: ModelConfig) -> tuple[str, str]:
    """Names of the parameters behind the last layer: the norm's, and the output matrix's."""
    return "final_norm", "embedding" if config.tie_embeddings else "lm_head"


def hidden_logits(
    config: ModelConfig, params: Mapping[str, Any], x: Float[Array, "B T D"]
) -> Float[Array, "B T V"]:
    """Logits of the last layer's output; of `params` only those of `output_params` are read."""
    norm, matrix = output_params(config)
    weight = params[matrix].T if config.tie_embeddings else params[matrix]
    return output_logits(config, params[norm], weight, x)


def init_layer_cache(config: AttentionConfig, batch_size: int, max_len: int, dtype: Any) -> Any:
    """An empty cache of the kind that this attention fills."""
    return ATTENTION[type(config)].init_cache(config, batch_size, max_len, jnp.dtype(dtype))


def check_room(cache: Any, positions: jax.Array) -> None:
    """Outside jit: raises ValueError if the new tokens don't fit into the cache."""
    entry = cache[0]
    if isinstance(positions, Tracer) or isinstance(entry.lengths, Tracer):
        return
    needed = np.asarray(entry.lengths) + (np.asarray(positions) >= 0).sum(axis=1)
    capacity = np.broadcast_to(np.asarray(entry.capacity), needed.shape)
    if (needed > capacity).any():
        worst = np.argmax(needed - capacity)
        raise ValueError(
            f"the cache has room for {capacity[worst]} tokens a sequence, got {needed[worst]}"
        )


def default_rope_lengths(positions: jax.Array, cache: Any) -> jax.Array:
    """[B] whole lengths: up to the last position, or what the cache was made for."""
    if cache is None:
        return jnp.max(positions, axis=1) + 1
    return jnp.full((positions.shape[0],), cache[0].capacity, jnp.int32)


def last_valid(x: Float[Array, "B T D"], positions: Int[Array, "B T"]) -> Float[Array, "B 1 D"]:
    """Each sequence's last token that is no padding (right padding)."""
    last = jnp.maximum(jnp.sum(positions >= 0, axis=1, dtype=jnp.int32) - 1, 0)
    return jnp.take_along_axis(x, last[:, None, None], axis=1)
