"""The decoder-only transformer: embeds tokens, runs the blocks, and computes logits.

The functions take a configuration, parameters and arrays. `Transformer` is the Linen module that
declares the parameters and calls the functions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvjax.cache import NoCache, advance, rope_lengths_of, with_layer
from kvjax.cache.dense import new_cache
from kvjax.checks import COUNT, check_ranges, float_dtype
from kvjax.config import (
    DecoupledConfig,
    EqualCacheConfig,
    GQAConfig,
    LayerConfig,
    MLAConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
)
from kvjax.mesh import automatic_axes, on_automatic_mesh
from kvjax.nn.attention import decoupled, equal_cache, gqa, mla
from kvjax.nn.checks import check_beside, check_cache, check_params_fit, check_room, check_tokens
from kvjax.nn.layers import matmul, mlp, moe, norm, rms_norm, with_pairs, without_pairs
from kvjax.nn.params import Declared, declare, layer_params, outside_layers

CACHE = {"batch_size": COUNT, "max_len": COUNT}
"""What the numbers of `Transformer.init_cache` may be."""
NO_TOKEN = -1
"""The token for logits that are not finite: argmax would return token 0 for ever."""

ATTENTION: dict[type, Callable[..., tuple[jax.Array, Any]]] = {
    GQAConfig: gqa,
    EqualCacheConfig: equal_cache,
    MLAConfig: mla,
    DecoupledConfig: decoupled,
}
MLPS: dict[type, Callable[..., jax.Array]] = {MLPConfig: mlp, MoEConfig: moe}


@dataclass(frozen=True)
class Block:
    """The configuration of one layer with the model's norms; hashable.

    x + attention, then x + MLP, with the norms that the config asks for.
    """

    layer: LayerConfig
    norm: NormConfig
    pre_norm: bool = True
    post_norm: bool = False

    def apply(
        self,
        params: Any,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        cache: Any,
        lengths: Int[Array, " B"],
    ) -> tuple[Float[Array, "B T D"], Any]:
        """The output of the layer, and its cache with the new entries."""
        y, cache = self.attend(params, x, positions, cache, lengths)
        x = x + norm(params, "attn_post_norm", y, self.norm)
        with jax.named_scope("mlp"):
            run = MLPS[type(self.layer.mlp)]
            y = norm(params, "mlp_pre_norm", x, self.norm)
            y = run(self.layer.mlp, params["mlp"], y)
        return x + norm(params, "mlp_post_norm", y, self.norm), cache

    def attend(
        self,
        params: Any,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        cache: Any,
        lengths: Int[Array, " B"],
    ) -> tuple[Float[Array, "B T D"], Any]:
        """The output of the attention, before norm and residual sum, and its cache."""
        config, y = self.layer.attention, attention_input(self, params, x)
        with jax.named_scope("attn"):
            run = ATTENTION[type(config)]
            return run(config, params["attn"], y, positions, cache, lengths)


class BlockKind(NamedTuple):
    """A block, separated from the facts that differ between layers and change no shape.

    Layers of one kind share one compiled program, and the differing facts are its arguments.

    Attributes:
        block: the block without these facts; hashable.
        pairs: [R/2] int32, the frequencies that a converted layer's rotary key has
            (`SelectedPairs`); None for other layers.
    """

    block: Block
    pairs: Int[np.ndarray, " half"] | None


@functools.lru_cache
def block_kinds(config: ModelConfig) -> tuple[BlockKind, ...]:
    """The kind of each layer."""
    return tuple(block_kind(config, layer) for layer in config.layers)


def block_kind(config: ModelConfig, layer: LayerConfig) -> BlockKind:
    """The kind of a layer with the model's norms; the layer need not be one of the model's."""
    rope, pairs = without_pairs(layer.attention.rope)
    if pairs is not None:
        attention: Any = dataclasses.replace(layer.attention, rope=rope)  # type: ignore
        layer = dataclasses.replace(layer, attention=attention)
    block = Block(layer, config.norm, config.pre_norm, config.post_norm)
    return BlockKind(block, pairs)


def whole_block(block: Block, pairs: Int[Array, " half"] | None) -> Block:
    """The block of a kind with the pairs of one layer. The result is not hashable."""
    if pairs is None:
        return block
    rope = with_pairs(block.layer.attention.rope, pairs)
    attention: Any = dataclasses.replace(block.layer.attention, rope=rope)  # type: ignore
    return dataclasses.replace(block, layer=dataclasses.replace(block.layer, attention=attention))


def apply_block(
    block: Block,
    params: Any,
    pairs: Int[Array, " half"] | None,
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    cache: Any,
    rope_lengths: Int[Array, " B"],
) -> tuple[Float[Array, "B T D"], Any]:
    """One layer of a `BlockKind`."""
    return whole_block(block, pairs).apply(params, x, positions, cache, rope_lengths)


BlockProgram = Callable[..., tuple[jax.Array, Any]]
"""`apply_block` of one kind, compiled; takes (params, pairs, x, positions, cache, rope_lengths)."""


@functools.cache
def block_program(block: Block, donate: bool = False) -> BlockProgram:
    """The compiled block that all layers of a kind share.

    Args:
        donate: write the passed cache in place; the caller must not use it again.
    """
    return jax.jit(functools.partial(apply_block, block), donate_argnums=(4,) if donate else ())


def run_layer(
    kind: BlockKind,
    params: Any,
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    cache: Any,
    rope_lengths: Int[Array, " B"],
    donate: bool = False,
) -> tuple[Float[Array, "B T D"], Any]:
    """Runs one layer with the program of its kind; under `jax.jit` as part of the caller."""
    return block_program(kind.block, donate)(params, kind.pairs, x, positions, cache, rope_lengths)


def text_positions(x: Float[Array, "B T ..."]) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """Positions 0 … T − 1 and lengths T of B texts without padding."""
    B, T = x.shape[:2]
    at = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    return at, jnp.full((B,), T, jnp.int32)


def layer_output(kind: BlockKind, params: Any, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The output of one layer for texts without padding, without a cache."""
    at, lengths = text_positions(x)
    return run_layer(kind, params, x, at, NoCache(), lengths)[0]


def attention_input(block: Block, params: Any, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The input of a block's attention: the block's input, normed if the model has a pre-norm."""
    return norm(params, "attn_pre_norm", x, block.norm)


@functools.partial(jax.jit, static_argnums=0)
def attention_output(
    block: Block, params: Any, pairs: Int[Array, " half"] | None, x: Float[Array, "B T D"]
) -> Float[Array, "B T D"]:
    """The output of a block's attention for texts without padding, before norm and residual sum.

    Args:
        block, params, pairs: as for `apply_block`.
        x: the input of the block.
    """
    at, lengths = text_positions(x)
    return whole_block(block, pairs).attend(params, x, at, NoCache(), lengths)[0]


class Transformer(nn.Module):
    """A causal language model. Parameters are a plain nested dict; caches are arguments.

    Examples:
        >>> logits, _ = model.apply({"params": params}, tokens)
        >>> cache = model.init_cache(1, 64, dtype="float32")
        >>> logits, cache = model.apply({"params": params}, tokens, cache=cache)
    """

    config: ModelConfig

    def setup(self):
        c = self.config
        self.outside = declare(self, outside_layers(c))
        if self.is_initializing():  # later calls read the parameters of a layer by its name
            self.layers = [Declared(layer_params(c, layer)) for layer in c.layers]

    def __call__(
        self,
        tokens: Int[Array, "B T"] | Int[np.ndarray, "B T"],
        positions: Int[Array, "B T"] | Int[np.ndarray, "B T"] | None = None,
        cache: Any = None,
        *,
        rope_lengths: Int[Array, " B"] | Int[np.ndarray, " B"] | None = None,
        segment_ids: Int[Array, "B T"] | Int[np.ndarray, "B T"] | None = None,
        logits_at: str = "all",
    ) -> tuple[Float[Array, "B O V"], Any]:
        """Next-token logits.

        Args:
            tokens: [B, T] int32.
            positions: [B, T] int32; −1 marks padding (on the right), which is neither stored nor
                attended to. None: 0 … T−1 without a cache; with a cache the positions from each
                sequence's length on.
            cache: from `init_cache` or `kvjax.prefill`; None for a full causal forward.
            rope_lengths: [B] total lengths, for RoPE rules that depend on the length. None: the
                last position + 1 without a cache; with a cache the lengths that `prefill` stored,
                or the capacity of a cache from `init_cache`.
            segment_ids: [B, T] int32, the document of each token, where a row packs several; only
                without a cache. Tokens attend within their document; positions (and so RoPE)
                should restart in each document.
            logits_at: "all", or "last" for only the last token before the padding.

            Returns:
                Logits [B, T, V] fp32 ([B, 1, V] for "last"), and the cache with the new entries, or
                None without a cache. Do not use the passed cache again if it was donated.

            Raises:
                ValueError: outside jit, more tokens than the cache has room for. (Inside jit the
                    surplus is dropped, and the cache's lengths exceed its capacity.) Segment ids
                    together with a cache. Tokens that are not an integer array of two dimensions,
                    or positions and segment ids of another shape. Parameters or a cache of another
                    model.
        """
        # Check the arguments, and fill in positions and lengths.
        if logits_at not in ("all", "last"):
            raise ValueError(f"logits_at is {logits_at!r}, expected 'all' or 'last'")
        if segment_ids is not None and cache is not None:
            raise ValueError("got segment_ids and a cache, expected packed documents without one")
        check_tokens(tokens)
        check_beside(tokens, positions=positions, segment_ids=segment_ids)
        if cache is not None:
            check_cache(self.config, cache, len(tokens))
        if not self.is_initializing():
            check_params_fit(self.config, self.variables["params"])
        given = tokens, positions, rope_lengths, segment_ids  # NumPy arrays become jax arrays
        arrays: Any = jax.tree.map(jnp.asarray, given)
        ids, places, lengths, documents = arrays
        at = self._positions(ids, places, cache)
        if lengths is None:
            lengths = default_rope_lengths(at, cache)
        # Run the layers. Pools count the new tokens after the last one: remember the old lengths.
        held = None if cache is None else cache[0].lengths
        x = self.embed(ids)
        for index in range(self.config.num_layers):
            entry = NoCache(documents) if cache is None else cache[index]
            x, entry = self.layer(index, x, at, entry, lengths)
            if cache is not None:
                cache = with_layer(cache, index, entry)
        if cache is not None:
            cache = advance(cache, _lengths_with(held, at))
        # Norm and output matrix only for the tokens whose logits are asked for.
        if logits_at == "last":
            x = last_valid(x, at)
        return self.unembed(x), cache

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Input embeddings."""
        return embed_tokens(self.config, self.outside["embedding"], tokens)

    def layer(
        self,
        index: int,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        cache: Any,
        rope_lengths: Int[Array, " B"],
    ) -> tuple[Float[Array, "B T D"], Any]:
        """One block, with the program that all layers of its kind share."""
        params: Any = self.variables["params"]
        # Linen declares the parameters of a layer when its module is called.
        own = self.layers[index]() if self.is_initializing() else params[f"layers_{index}"]
        return run_layer(block_kinds(self.config)[index], own, x, positions, cache, rope_lengths)

    def unembed(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Final norm and output logits, fp32."""
        return hidden_logits(self.config, self.outside, x)

    @nn.nowrap
    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """`nn.Module.apply`, also for arrays on a mesh with explicit axes."""
        with automatic_axes():
            variables, args, kwargs = on_automatic_mesh((variables, args, kwargs))
            return super().apply(variables, *args, **kwargs)

    def init_cache(self, batch_size: int, max_len: int, dtype: Any = "bfloat16") -> list[Any]:
        """Empty caches, one per layer, for `max_len` tokens in each of `batch_size` sequences.

        Raises:
            ValueError: a number below 1, or a dtype that is no floating-point type.
        """
        check_ranges({"batch_size": batch_size, "max_len": max_len}, CACHE)
        dtype = float_dtype(dtype)
        return [
            new_cache(layer.attention, batch_size, max_len, dtype) for layer in self.config.layers
        ]

    def _positions(self, tokens, positions, cache):
        if positions is None:
            if cache is None:
                steps = np.arange(tokens.shape[1], dtype=np.int32)[None]
                return jnp.asarray(np.broadcast_to(steps, tokens.shape))
            positions = _following(tokens.shape[1], cache[0].lengths)
        if cache is not None:
            check_room(cache, positions)
        return positions


def embed(
    config: ModelConfig,
    params: Mapping[str, Any],
    tokens: Int[Array, "B T"] | Int[np.ndarray, "B T"],
) -> Float[Array, "B T D"]:
    """Input embeddings of token ids; reads only the embedding among `params`."""
    return embed_tokens(config, params["embedding"], jnp.asarray(tokens))


def embed_tokens(
    config: ModelConfig, embedding: Float[Array, "V D"], tokens: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Input embeddings, as one program or as part of the caller's."""
    return _embed(config.embedding_scale, embedding, tokens)


@functools.partial(jax.jit, static_argnums=0)
def _embed(scale: float, embedding: jax.Array, tokens: jax.Array) -> jax.Array:
    if tokens.size == 1:
        # XLA:GPU turns the lookup of one row into a slice, for which each device gets the whole
        # sharded table (1 GB per step for Llama-3-8B). For two rows it sends only the rows.
        x = jnp.take(embedding, jnp.concatenate([tokens, tokens]), axis=0)[:1]
    else:
        x = jnp.take(embedding, tokens, axis=0)
    # Gemma rounds the factor to the activations' dtype.
    return x * jnp.asarray(scale, x.dtype)


def hidden_logits(
    config: ModelConfig, params: Mapping[str, Any], x: Float[Array, "B T D"]
) -> Float[Array, "B T V"]:
    """Final norm and fp32 logits of the last layer's output, as one program or as part of the
    caller's; reads only `output_params` among `params`."""
    norm, matrix = output_params(config)
    settings = config.norm, config.final_softcap, config.tie_embeddings
    return _logits(*settings, params[norm], params[matrix], x)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _logits(
    norm: NormConfig,
    softcap: float | None,
    tied: bool,
    final_norm: jax.Array,
    matrix: jax.Array,
    x: jax.Array,
) -> jax.Array:
    # Transposed inside a program: outside, the transposed embedding would be a copy.
    weight = matrix.T if tied else matrix
    logits = matmul(rms_norm(x, final_norm, norm), weight, jnp.float32)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def most_likely(logits: Float[Array, "*rows V"]) -> Int[Array, "*rows"]:
    """The id with the largest logit, int32; NO_TOKEN if a logit is not finite."""
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jnp.where(finite_rows(logits), best, jnp.int32(NO_TOKEN))


def finite_rows(logits: Float[Array, "*rows V"]) -> Bool[Array, "*rows"]:
    """Whether all numbers of each row are finite."""
    return jnp.all(jnp.isfinite(logits), axis=-1)


def output_params(config: ModelConfig) -> tuple[str, str]:
    """Names of the parameters after the last layer: the final norm and the output matrix."""
    return "final_norm", "embedding" if config.tie_embeddings else "lm_head"


def default_rope_lengths(positions: jax.Array, cache: Any) -> jax.Array:
    """[B] total lengths: up to the last position, or the length that the cache was made for."""
    return _ends(positions) if cache is None else rope_lengths_of(cache)


@functools.partial(jax.jit, static_argnums=0)
def _following(count: int, lengths: Int[Array, " B"]) -> Int[Array, "B T"]:
    return lengths[:, None] + jnp.arange(count, dtype=jnp.int32)[None]


@jax.jit
def _lengths_with(held: Int[Array, " B"], at: Int[Array, "B T"]) -> Int[Array, " B"]:
    return held + jnp.sum(at >= 0, axis=1, dtype=jnp.int32)


@jax.jit
def _ends(positions: Int[Array, "B T"]) -> Int[Array, " B"]:
    return jnp.max(positions, axis=1) + 1


def last_valid(x: Float[Array, "B T D"], positions: Int[Array, "B T"]) -> Float[Array, "B 1 D"]:
    """Each sequence's last token before the padding (on the right)."""
    last = jnp.maximum(jnp.sum(positions >= 0, axis=1, dtype=jnp.int32) - 1, 0)
    return jnp.take_along_axis(x, last[:, None, None], axis=1)
