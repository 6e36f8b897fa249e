"""Prefill: reads prompts one layer at a time, and compresses each layer right after reading it.

One program reads a layer under every policy, because attention sees the whole prompt. The policy's
choice of tokens comes after that, so one pass over the prompts serves several policies.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from kvjax.cache import ModelCache, PrefillCache
from kvjax.cache.dense import start_prefill
from kvjax.cache.sharded import spread_prefill
from kvjax.checks import SIZE, check_ranges, shown, token_ids
from kvjax.config import AttentionConfig, ModelConfig
from kvjax.mesh import AnyMesh, Placement, automatic_axes, mesh_of, on_automatic_mesh, put_rows
from kvjax.nn import Transformer
from kvjax.nn.checks import check_fits, check_tokens
from kvjax.nn.transformer import (
    Block,
    apply_block,
    block_kinds,
    embed_tokens,
    hidden_logits,
    output_params,
)
from kvjax.policies.compression import Compression
from kvjax.policies.named import resolve_each
from kvjax.policies.policy import Policy

CHUNK_ROWS = 2048
"""Tokens of all sequences that a layer reads at a time: enough to fill matrix units, and few enough
to keep their activations small."""
SHORTEST_CHUNK, LONGEST_CHUNK = 256, 1024
"""Bounds on the tokens of one sequence that a layer reads at a time: each chunk reads all keys."""
SMALLEST_BUCKET = 32
"""Tokens of the shortest padded prompt."""
OBSERVED = 32
"""Least number of last queries that prefill keeps, so that most policies share one program."""


@automatic_axes()
def prefill(
    model: Transformer,
    params: Any,
    tokens: Int[Array | np.ndarray, "B T"],
    lengths: Int[Array | np.ndarray, " B"],
    policy: str | Policy | Sequence[str | Policy] = "full",
    max_new_tokens: int = 64,
) -> tuple[Float[Array, "B V"], Any]:
    """Reads prompts, and keeps the tokens that the policy chooses.

    Compiles two programs for each kind of layer, and one for each kind of layer and scorer, in each
    bucket of prompt lengths (see `bucket_length`). Budgets and lengths are data, and so is
    `max_new_tokens` within its bucket (64, 128, 256, …).

    Examples:
        >>> logits, cache = kvjax.prefill(model, params, tokens, lengths, "snapkv:kv_size=24")
        >>> token = logits.argmax(-1).astype("int32")
        >>> logits, cache = kvjax.decode_step(model, params, cache, token)

    Args:
        tokens: [B, T] int32, padded on the right.
        lengths: [B] int32, tokens of each prompt.
        policy: as in `kvjax.generate`, or several policies, for which the prompts are read once.
        max_new_tokens: number of new tokens that the cache must have room for.

    Returns:
        Logits after the last token of each prompt, fp32, and the cache. For several policies a list
        of caches, each equal to the cache of its policy alone.

    Raises:
        ValueError: tokens that are no integers [B, T] or outside the vocabulary, a length that is
            not 1 to T, parameters of another model, or a policy that cannot be resolved.
    """
    check_fits(model, params)
    check_ranges({"max_new_tokens": max_new_tokens}, {"max_new_tokens": SIZE})
    params = on_automatic_mesh(params)
    tokens, lengths = checked_prompts(tokens, lengths, model.config.vocab_size)
    one = isinstance(policy, str | Policy)
    policies = [policy] if one else list(policy)  # type: ignore[list-item]
    if not policies:
        raise ValueError("got no policies, expected at least one")
    resolved = resolve_each(policies, model.config)
    works = compressions(model, params, lengths, resolved, max_new_tokens)
    logits, caches = read_prompts(model, params, tokens, works)
    return logits, caches[0] if one else caches


def checked_prompts(tokens: Any, lengths: Any, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [B, T] with zeros as padding, and the lengths [B]; int32."""
    ids, sizes = np.asarray(tokens), np.asarray(lengths)
    check_tokens(ids)
    B, T = ids.shape
    if (
        sizes.shape != (B,)
        or sizes.dtype.kind not in "iu"
        or not 1 <= sizes.min() <= sizes.max() <= T
    ):
        raise ValueError(f"lengths is {shown(lengths)}, expected [{B}] integers from 1 to {T}")
    ids = np.where(np.arange(T) < sizes[:, None], ids, 0)
    return token_ids(ids, vocab_size, "tokens"), sizes.astype(np.int32)


def read_prompts(
    model: Transformer,
    params: Any,
    tokens: Int[np.ndarray, "B T"],
    works: Sequence[Compression],
) -> tuple[Float[Array, "B V"], list[ModelCache]]:
    """`prefill` for compressions of this batch; always returns a list of caches."""
    mesh, placement = mesh_of(params), works[0].placement
    # Pad to the bucket's length and move the arrays to the devices.
    missing = bucket_length(tokens.shape[1]) - tokens.shape[1]
    pad = jnp.pad if isinstance(tokens, Tracer) else np.pad  # jnp.pad compiles for every length
    padded = pad(tokens, ((0, 0), (0, missing))).astype(np.int32)
    device = device_of(params, mesh)
    ids, lengths = put_rows((padded, works[0].lengths), device, placement)
    # Read layer by layer. Each layer's prompt goes to all policies, and is then dropped.
    caches = [work.start(device) for work in works]
    observed = observed_queries(works)
    x, before = embed_chunks(model.config, mesh, params["embedding"], ids), None
    for layer, kind in enumerate(block_kinds(model.config)):
        watching, own = Watching.of(works, layer), params[f"layers_{layer}"]
        # Wait for the layer before. jax dispatches ahead, and otherwise the uncompressed keys and
        # values of many layers would exist at once.
        jax.block_until_ready(before)
        settings = {"observed": observed, "observers": watching.observers, "mesh": mesh}
        arrays = (own, kind.pairs, x, lengths, caches[0].rope_lengths)
        x, prompt = read_layer(kind.block, *arrays, **settings)
        caches = compress_each(works, caches, layer, prompt, watching)
        before = prompt.lengths
    top = {name: params[name] for name in output_params(model.config)}
    return last_logits(model.config, top, x, lengths), caches


def compress_each(
    works: Sequence[Compression],
    caches: Sequence[ModelCache],
    layer: int,
    prompt: PrefillCache,
    watching: Watching,
) -> list[ModelCache]:
    """The caches of all policies with what each keeps of one layer's prompt."""
    rankings: dict[Any, Any] = {}
    return [
        work.compress(own, layer, prompt.seen_by(observer), rankings)
        for work, own, observer in zip(works, caches, watching.wanted, strict=True)
    ]


def bucket_length(length: int) -> int:
    """The smallest of 32, 48, 64, 96, 128, … that holds `length` tokens."""
    bucket = SMALLEST_BUCKET
    while bucket < length:
        if bucket * 3 // 2 >= length:
            return bucket * 3 // 2
        bucket *= 2
    return bucket


def pad(prompts: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded ids [B, length] and lengths [B], int32."""
    tokens = np.zeros((len(prompts), length), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, np.asarray([len(prompt) for prompt in prompts], np.int32)


def device_of(params: Any, mesh: Mesh | None) -> Any:
    """The sharding of the parameters; None on a mesh and under jax tracing."""
    embedding = params["embedding"]
    if isinstance(embedding, np.ndarray):
        raise ValueError("params are NumPy arrays, expected jax arrays: jax.device_put(params)")
    return None if mesh is not None or isinstance(embedding, Tracer) else embedding.sharding


def compressions(
    model: Transformer,
    params: Any,
    lengths: Int[np.ndarray, " B"],
    policies: Sequence[Policy],
    max_new_tokens: int,
) -> list[Compression]:
    """The policies applied to prompts of these lengths."""
    mesh, dtype = mesh_of(params), params["embedding"].dtype
    placement = None if mesh is None else Placement.create(mesh, len(lengths))
    return [
        p.compression(model.config, lengths, max_new_tokens, dtype, placement) for p in policies
    ]


def shape_bytes(work: Compression, slots: int) -> int:
    """Bytes of the caches after prefill of prompts padded to `slots`, from shapes alone."""
    leaves = jax.tree.leaves(cache_shapes(work, slots))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def prompt_bytes(policy: Policy, config: ModelConfig, length: int, dtype: Any) -> int:
    """Bytes of what a policy keeps of one prompt of `length` tokens, without room for new ones.

    Args:
        policy: ready for the model, see `kvjax.policies.named.resolve_each`.
    """
    return shape_bytes(policy.compression(config, [length], 0, dtype), length)


def cache_shapes(work: Compression, slots: int) -> ModelCache:
    """Shapes of the caches after prefill of prompts padded to `slots`."""
    shape = len(work.lengths), slots, observed_queries([work])
    mesh = None if work.placement is None else work.placement.mesh

    def make() -> ModelCache:
        caches = work.start()
        for index, layer in enumerate(work.config.layers):
            if caches.places[index] is not None and not work.budgets.again:
                continue  # a pool's arrays have their shapes from the start
            watching = Watching.of([work], index)
            observers = watching.observers
            prompt = empty_prompt(layer.attention, *shape, work.dtype, observers, mesh)
            caches = work.compress(caches, index, prompt.seen_by(watching.wanted[0]))
        return caches

    return jax.eval_shape(make)


def observed_queries(works: Sequence[Compression]) -> int:
    """Number of last queries that prefill keeps: a power of two, so that few programs exist."""
    most = max(work.budgets.observed for work in works)
    return max(OBSERVED, 1 << max(most - 1, 0).bit_length())


class Watching(NamedTuple):
    """The observers that several policies' scorers need in one layer.

    Attributes:
        observers: the different observers, each once.
        wanted: for each policy the index of its observer; None for none.
    """

    observers: tuple[Any, ...]
    wanted: tuple[int | None, ...]

    @classmethod
    def of(cls, works: Sequence[Compression], layer: int) -> Watching:
        """The observers of one layer for these compressions."""
        each = [work.observer(layer) for work in works]
        distinct = tuple(dict.fromkeys(observer for observer in each if observer is not None))
        numbers = (None if observer is None else distinct.index(observer) for observer in each)
        return cls(distinct, tuple(numbers))


@functools.partial(
    jax.jit,
    static_argnames=("block", "observed", "observers", "mesh", "chunk"),
    donate_argnames="x",
)
def read_layer(
    block: Block,
    params: Any,
    pairs: Any,
    x: Float[Array, "B T D"],
    lengths: Int[Array, " B"],
    rope_lengths: Int[Array, " B"],
    *,
    observed: int,
    observers: tuple[Any, ...] = (),
    mesh: Mesh | None = None,
    chunk: int | None = None,
) -> tuple[Float[Array, "B T D"], PrefillCache]:
    """One layer over the whole prompt, in chunks that end with the longest sequence.

    Besides the residual stream only one chunk's activations exist. The chunk size changes no
    result.

    Args:
        observed: number of last queries that the cache keeps.
        observers: see all queries of the prompt.
        mesh: the mesh of the parameters.
        chunk: tokens of a sequence that are read at a time; None for `chunk_tokens`.
    """
    # An empty cache, and the positions of the tokens.
    B, T, D = x.shape
    chunk = chunk_tokens(B, mesh) if chunk is None else chunk
    cache = empty_prompt(block.layer.attention, B, T, observed, x.dtype, observers, mesh)
    place = stream_place(mesh, B, D)
    positions = jnp.arange(T, dtype=jnp.int32)[None]
    positions = jnp.where(positions < lengths[:, None], positions, -1)

    def call(x: jax.Array, at: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        return apply_block(block, params, pairs, x, at, cache, rope_lengths)

    # A short prompt is one chunk.
    if chunk >= T:
        x, cache = call(x, positions, cache)
        return place(x), cache
    # Whole chunks in a loop that ends with the longest sequence, then the rest.
    whole = T // chunk * chunk

    def read(index: jax.Array, state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        x, cache = state
        part = jax.lax.dynamic_slice_in_dim(x, index * chunk, chunk, 1)
        at = jax.lax.dynamic_slice_in_dim(positions, index * chunk, chunk, 1)
        part, cache = call(part, at, cache)
        return place(jax.lax.dynamic_update_slice_in_dim(x, part, index * chunk, 1)), cache

    filled = jnp.minimum(-(-jnp.max(lengths) // chunk), whole // chunk)
    x, cache = jax.lax.fori_loop(0, filled, read, (x, cache))
    if whole < T:
        part, cache = call(x[:, whole:], positions[:, whole:], cache)
        x = place(x.at[:, whole:].set(part))
    return x, cache


def empty_prompt(
    attention: AttentionConfig,
    batch: int,
    prompt_len: int,
    queries: int,
    dtype: Any,
    observers: tuple[Any, ...],
    mesh: AnyMesh | None,
) -> PrefillCache:
    """`start_prefill`, sharded over a mesh if there is one."""
    cache = start_prefill(attention, batch, prompt_len, queries, dtype, observers)
    return (
        cache if mesh is None else spread_prefill(attention, cache, Placement.create(mesh, batch))
    )


def chunk_tokens(batch: int, mesh: Mesh | None) -> int:
    """Tokens of each sequence that a layer reads at a time: a power of two."""
    most = max(CHUNK_ROWS * batch_ways(mesh, batch) // batch, 1)
    return min(max(1 << most.bit_length() - 1, SHORTEST_CHUNK), LONGEST_CHUNK)


def stream_place(mesh: Mesh | None, batch: int, width: int) -> Any:
    """Shards the residual stream between layers: features over the tensor axis, so that no device
    holds the whole stream of a long prompt. A layer gathers one chunk at a time."""
    if mesh is None:
        return lambda x: x
    placement = Placement.create(mesh, batch)
    sharded = width % placement.ways == 0
    return lambda x: placement.place(x, "batch", None, "tensor" if sharded else None)


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def embed_chunks(
    config: Any,
    mesh: Mesh | None,
    embedding: Float[Array, "V D"],
    tokens: Int[Array, "B T"],
) -> Float[Array, "B T D"]:
    """The prompts' embeddings. On a mesh a lookup in a sharded table gives every device all
    features, so the lookup takes one chunk at a time."""
    (B, T), D = tokens.shape, embedding.shape[1]
    place, chunk = stream_place(mesh, B, D), chunk_tokens(B, mesh)
    if mesh is None or chunk >= T:
        return place(embed_tokens(config, embedding, tokens))

    def read(index: jax.Array, x: jax.Array) -> jax.Array:
        # The last chunk reaches back into the one before it, and writes the same numbers again.
        start = jnp.minimum(index * chunk, T - chunk)
        ids = jax.lax.dynamic_slice_in_dim(tokens, start, chunk, 1)
        part = embed_tokens(config, embedding, ids)
        return place(jax.lax.dynamic_update_slice_in_dim(x, part, start, 1))

    empty = place(jnp.zeros((B, T, D), embedding.dtype))
    return jax.lax.fori_loop(0, -(-T // chunk), read, empty)


@functools.partial(jax.jit, static_argnames="config")
def last_logits(
    config: Any, params: Any, x: Float[Array, "B T D"], lengths: Int[Array, " B"]
) -> Float[Array, "B V"]:
    """Logits after the last token of each prompt."""
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    return hidden_logits(config, params, last)[:, 0]


def prefill_in_groups(
    model: Transformer,
    params: Any,
    tokens: Int[np.ndarray, "B T"],
    works: Sequence[Compression],
    size: int | None = None,
) -> tuple[jax.Array, list[Any]]:
    """`read_prompts` for one group of sequences after another.

    Prefill needs memory for the uncompressed keys and values of up to two layers, and for the
    residual streams. With small caches this limits the batch, unless few sequences are read at a
    time.

    Args:
        works: the policies, applied to the whole batch.
        size: upper bound on the sequences in a group. A group has the largest divisor of the batch
            within the bound, and at least one sequence per device of the batch axes. None: one
            group.

    Returns:
        As `read_prompts`.
    """
    ways = batch_ways(mesh_of(params), len(tokens))
    rows = group_rows(len(tokens), size, ways)
    if len(rows) == 1:
        return read_prompts(model, params, tokens, works)
    whole: Any = None
    # The first group tells the shapes of all; each group is written in its place.
    for index, group in enumerate(rows):
        part = read_prompts(model, params, tokens[group], [work.take(group) for work in works])
        whole = jax.tree.map(functools.partial(_empty, len(rows)), part) if index == 0 else whole
        whole = _put(whole, part, jnp.asarray(index, jnp.int32), ways)
    return whole


def batch_ways(mesh: Mesh | None, batch: int) -> int:
    """Number of devices that a batch is sharded over."""
    return 1 if mesh is None else Placement.create(mesh, batch).batch_ways


def group_rows(batch: int, size: int | None, ways: int) -> Int[np.ndarray, "groups size"]:
    """The sequences of each group, equally many from every device's share of the batch.

    Raises:
        ValueError: the size is below 1.
    """
    if size is not None and size < 1:
        raise ValueError(f"prefill_size is {size}, expected ≥ 1")
    share = batch // ways
    own = max(
        (n for n in range(1, share + 1) if share % n == 0 and n * ways <= (size or batch)),
        default=1,
    )
    order = np.arange(batch).reshape(ways, share // own, own)
    return np.swapaxes(order, 0, 1).reshape(-1, ways * own)


def _empty(groups: int, leaf: jax.Array) -> jax.Array:
    """An array for all groups, sharded like the first group's array."""
    shape = (groups * leaf.shape[0], *leaf.shape[1:])
    return jnp.zeros(shape, leaf.dtype, device=leaf.sharding)


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _put(whole: Any, part: Any, index: jax.Array, ways: int) -> Any:
    """Writes one group's rows into every device's share."""

    def put(whole: jax.Array, part: jax.Array) -> jax.Array:
        # The batch axis as (device, group, row): a write then stays on its device.
        own = part.shape[0] // ways
        shares = whole.reshape(ways, -1, own, *whole.shape[1:])
        new = part.reshape(ways, 1, own, *part.shape[1:])
        shares = jax.lax.dynamic_update_slice_in_dim(shares, new, index, 1)
        return shares.reshape(whole.shape)

    return jax.tree.map(put, whole, part)
