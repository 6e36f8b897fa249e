"""Contexts: a text is read and compressed once, saved in one file, and used for many questions."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Int

from kvjax.cache import DenseCache, LatentCache, ModelCache, Pool, cache_bytes
from kvjax.cache.channels import KeyChannels
from kvjax.cache.pool import bucket_rows
from kvjax.cache.room import grow_pool, repeated_with_room, trimmed
from kvjax.cache.sharded import head_copies, spread_layer
from kvjax.cache.storage import room_bucket
from kvjax.checkpoint_files import NewTensor, read_head, write_file
from kvjax.checks import check_finite, check_prompts, first_not_finite
from kvjax.config import AttentionConfig, ModelConfig
from kvjax.feeding import not_finite
from kvjax.fields import Count, Flag, Object, Text, build, refuse, shown, within
from kvjax.identity import Identity, array_digest, identity
from kvjax.mesh import Placement, automatic_axes, mesh_of, on_automatic_mesh, put_rows
from kvjax.nn import Transformer
from kvjax.nn.checks import check_fits
from kvjax.nn.transformer import block_kinds, output_params, run_layer
from kvjax.paths import local_path
from kvjax.policies.named import measurements_digest, resolve_each
from kvjax.policies.policy import Policy, check_growth
from kvjax.prefilling import (
    bucket_length,
    compressions,
    embed_chunks,
    last_logits,
    pad,
    read_prompts,
)
from kvjax.text_files import parse_object
from pallas_kernels import Packed, Quantized
from pallas_kernels.packed import packed_bytes

PARTS = {
    part.__name__: part
    for part in (DenseCache, LatentCache, ModelCache, Pool, Quantized, Packed, KeyChannels)
}
FORMAT = "kvjax context 3"
"""Formats 1 and 2 had one cache per layer; format 1 did not identify the model's weights."""


@dataclass(frozen=True)
class Description:
    """What a file says about its context; `cache` names the tensors of the caches."""

    format: Text
    cache: Object
    length: Count
    policy: Text
    model: Identity
    chat: Flag = False
    made_from: Text = ""


@dataclass(frozen=True)
class Context:
    """The compressed cache of one text, which `kvjax.generate(…, context=…)` continues.

    Attributes:
        cache: the cache of one sequence, without room for more tokens.
        length: number of tokens that were read.
        policy: the policy that compressed the text, by name.
        model: identity of the model that read the text.
        chat: whether the text began in the chat template, see `kvjax.generate_text`.
        made_from: digest of the tokens, and of the policy's head scores and curves of need; empty
            once more text was read.
    """

    cache: ModelCache
    length: int
    policy: str
    model: Identity
    chat: bool = False
    made_from: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of the cache's arrays."""
        return cache_bytes(self.cache)

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file.

        Raises:
            ValueError: the path is a URL.
        """
        path = local_path(path, "the context")
        tensors: dict[str, np.ndarray] = {}
        cache = _describe(self.cache, "cache", tensors)
        model = dataclasses.asdict(self.model)
        facts = {"length": self.length, "policy": self.policy, "model": model, "chat": self.chat}
        facts["made_from"] = self.made_from
        content = json.dumps({"format": FORMAT, "cache": cache, **facts})
        new = [
            NewTensor(name, array.dtype, array.shape, lambda array=array: array)
            for name, array in tensors.items()
        ]
        write_file(path, new, {"kvjax": content})


@automatic_axes()
def compress(
    model: Transformer,
    params: Any,
    tokens: Sequence[int],
    policy: str | Policy,
    chat: bool = False,
) -> Context:
    """Reads a text and keeps the tokens that the policy chooses.

    Args:
        tokens: ids of the text; questions about the text come later.
        policy: as in `kvjax.generate`. Policies that look at the last queries do worse here, since
            the text does not end with a question; see docs/headkv.md.
        chat: the ids are `kvjax.chat.document_ids`: questions end the user's message that they
            begin.

    Raises:
        ValueError: no tokens, more than fit in the model's context, a policy that cannot be
            resolved or that bounds growth, or logits that are not finite.
    """
    check_fits(model, params)
    check_prompts([tokens], 1, model.config.vocab_size, model.config.context_length)
    params = on_automatic_mesh(params)
    (resolved,) = resolve_each([policy], model.config)
    check_growth([resolved], "a context")
    # Read the text as a batch of one, and store the live rows only.
    bucket = bucket_length(len(tokens))
    ids, lengths = pad([tokens], bucket)
    works = compressions(model, params, lengths, [resolved], max_new_tokens=0)
    logits, (cache,) = read_prompts(model, params, ids, works)
    if first_not_finite(logits) is not None:
        raise not_finite("the logits after the text", model, params, tokens)
    name = policy if isinstance(policy, str) else type(policy).__name__
    reader = reader_identity(model.config, params)
    origin = digest_of(tokens, resolved)
    return Context(trimmed(cache), len(tokens), name, reader, bool(chat), origin)


def digest_of(tokens: Sequence[int], policy: Policy) -> str:
    """`Context.made_from` of a text that a resolved policy compresses."""
    parts = array_digest(np.asarray(tokens, np.int32)), measurements_digest(policy)
    return "+".join(filter(None, parts))


@automatic_axes()
def extend_context(
    model: Transformer, params: Any, context: Context, tokens: Sequence[int]
) -> Context:
    """Reads more text after that of a context, which stays unchanged. All its tokens are kept.

    Args:
        tokens: ids of the text.

    Raises:
        ValueError: no tokens, more than fit in the model's context, a context of another model, or
            logits that are not finite.
    """
    check_fits(model, params)
    check_context(context)
    limits = model.config.vocab_size, model.config.context_length, context.length
    check_prompts([tokens], 1, *limits)
    params = on_automatic_mesh(params)
    check_model(context, model, params)
    ids, lengths = pad([tokens], bucket_length(len(tokens)))
    held = on_devices_of(params, context.cache)
    logits, cache = extend(model, params, ids, lengths, held, max_new_tokens=0)
    if first_not_finite(logits) is not None:
        raise not_finite("the logits after the text", model, params, tokens)
    length = context.length + len(tokens)
    return dataclasses.replace(context, cache=trimmed(cache), length=length, made_from="")


def load_context(path: str | Path, model: Transformer, params: Any) -> Context:
    """Reads a context that `Context.save` wrote, for use with the model that made it.

    Raises:
        ValueError: no such file, a file of another format or damaged, a context of another model,
            or a context with NaN.
    """
    check_fits(model, params)
    path = local_path(path, "the context")
    if not path.is_file():
        raise ValueError(f"no context at {path}")
    context = _read(path)
    check_model(context, model, params, str(path))
    check_cache(context.cache, model.config, f"{path} is a damaged context")
    return context


def _read(path: Path) -> Context:
    stored, metadata = read_head(path)
    with within(f"{path} is not a context"):
        content = parse_object(metadata.get("kvjax", "{}").encode(), "its description")
        if (found := content.get("format")) != FORMAT:
            raise ValueError(f"got {shown(found)}, expected {FORMAT}")
        facts = build(Description, content, "its description")
        # A damaged description can fail at any line: one error reports all failures.
        try:
            cache = _rebuild(facts.cache, stored)
            _check_parts(cache)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"its description is damaged ({said})") from None
    about = facts.length, facts.policy, facts.model, facts.chat, facts.made_from
    return Context(cache, *about)


def _check_parts(cache: Any) -> None:
    """Raises ValueError or TypeError unless every layer has a cache."""
    if not isinstance(cache, ModelCache) or cache.placement is not None:
        raise ValueError(f"the cache is a {type(cache).__name__}")
    for layer, (own, place) in enumerate(zip(cache.own, cache.places, strict=True)):
        if place is None:
            found = isinstance(own, DenseCache | LatentCache)
        else:
            number, row = place
            held = dict(enumerate(cache.pools)).get(number)
            found = own is None and isinstance(held, Pool) and row in range(held.starts.shape[1])
        if not found:
            raise ValueError(f"layer {layer} has no cache")


def check_cache(cache: ModelCache, config: ModelConfig, name: str) -> None:
    """Raises ValueError unless these are caches of one text of such a model, with finite entries.

    Args:
        name: begins the error.
    """
    with within(name):
        if len(cache) != config.num_layers:
            raise ValueError(f"got {len(cache)} layers, expected {config.num_layers}")
        if (got := getattr(cache.rope_lengths, "shape", None)) != (1,):
            raise ValueError(f"rope_lengths has shape {got}, expected (1,)")
        for layer, kind in enumerate(config.layers):
            refuse(_unlike(cache, layer, kind.attention), f"layer {layer}")
            check_finite(_layer_entries(cache, layer), f"layer {layer}/")


def _unlike(cache: ModelCache, layer: int, attention: AttentionConfig) -> Iterator[str]:
    """A line for each array of a layer's cache whose shape or dtype the model does not have."""
    place, (first, second) = cache.places[layer], attention.cached_widths
    held: Any = cache.own[layer] if place is None else cache.pools[place[0]]
    entries = ("latent", "k_rope") if isinstance(held, LatentCache) else ("k", "v")
    # The number of slots, or of rows, is that of the first array.
    heads = attention.cached_heads
    axes = (1, heads) if isinstance(held, DenseCache) else (1,)
    count = (*getattr(getattr(held, entries[0]), "shape", ()), 0, 0, 0)[len(axes)]
    expected = {entries[0]: (*axes, count, first), entries[1]: (*axes, count, second)}
    expected |= {"lengths": (1,), "evicted": (1,), "positions": (1, count)}
    if isinstance(held, Pool):
        rows = len(held.starts[0]) if np.ndim(held.starts) == 3 else 0
        tables = dict.fromkeys(("starts", "capacities", "kept", "rings"), (1, rows, heads))
        expected |= {"read": (1,), **tables}
        del expected["evicted"]
    wrong = False
    for name, shape in expected.items():
        value = getattr(held, name)
        got, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
        floats = name in entries
        # Accelerators may pad the last axis of latents with zeros.
        same = got == shape or (floats and got and got[:-1] == shape[:-1] and _wider(got, shape))
        good = dtype is not None and (dtype != np.int32 if floats else dtype == np.int32)
        if not (same and good) and not (value is None and name in ("evicted", "positions")):
            wrong = True
            yield f"{name} has shape {got} and dtype {dtype}, expected {shape}"
    if wrong:
        return
    layers = (len(held.starts[0]),) if isinstance(held, Pool) else ()
    yield from _unlike_format(held, entries, (1, *layers, heads, first))
    if isinstance(held, Pool):
        starts, kept = np.asarray(held.starts), np.asarray(held.kept)
        if starts.min() < 0 or kept.min() < 0 or (starts + kept).max() > count:
            yield f"its segments are not within the {count} rows of the pool"


def _wider(got: tuple[Any, ...], shape: tuple[int, ...]) -> bool:
    return isinstance(got[-1], int) and got[-1] > shape[-1]


def _unlike_format(held: Any, entries: Sequence[str], channels: tuple[int, ...]) -> Iterator[str]:
    """A line for each wrong array that 8-bit or 4-bit entries have besides their numbers.

    Args:
        channels: shape of the `KeyChannels` of keys in 8 or 4 bits.
    """
    found: dict[str, tuple[Any, tuple[int, ...], Any]] = {}
    for name in entries:
        value = getattr(held, name)
        if isinstance(value, Quantized):
            found[f"{name}.scale"] = value.scale, value.shape[:-1], np.float32
        elif isinstance(value, Packed):
            shape = (*value.shape[:-1], packed_bytes(value.width))
            found[f"{name}.values"] = value.values, shape, np.uint8
    of_keys = getattr(held, "channels", None)
    # Keys in 8 bits of earlier files are not normalised.
    keys = getattr(held, "k", None)
    nothing, some = not isinstance(keys, Packed), isinstance(keys, Packed | Quantized)
    if not (nothing if of_keys is None else some and isinstance(of_keys, KeyChannels)):
        kind = KeyChannels if some else type(None)
        yield f"channels is {type(of_keys).__name__}, expected {kind.__name__}"
    elif of_keys is not None:
        found["channels.centre"] = of_keys.centre, channels, jnp.bfloat16
        found["channels.size"] = of_keys.size, channels, jnp.bfloat16
    for name, (value, shape, dtype) in found.items():
        got = getattr(value, "shape", None), getattr(value, "dtype", None)
        if got != (shape, dtype):
            yield f"{name} has shape {got[0]} and dtype {got[1]}, expected {shape} {dtype}"


def _layer_entries(cache: ModelCache, layer: int) -> Any:
    """One layer's entries, as host arrays."""
    place = cache.places[layer]
    if place is None:
        return jax.tree.map(np.asarray, cache.own[layer])
    number, row = place
    pool = cache.pools[number]
    starts, kept = np.asarray(pool.starts)[0, row], np.asarray(pool.kept)[0, row]
    rows = slice(starts.min(), (starts + kept).max())
    held = jax.tree.map(lambda leaf: np.asarray(leaf)[:, rows], {"k": pool.k, "v": pool.v})
    return held | {"channels": jax.tree.map(lambda leaf: np.asarray(leaf)[:, row], pool.channels)}


def check_context(context: Any) -> None:
    """Raises ValueError for anything but a `Context`, such as the path of one."""
    if not isinstance(context, Context):
        raise ValueError(
            f"context is {shown(context)}, expected a kvjax.Context: "
            "kvjax.load_context(PATH, model, params) reads a file"
        )


def check_model(
    context: Context, model: Transformer, params: Any, name: str = "the context"
) -> None:
    """Raises ValueError, with the differences, unless this same model read the context.

    Reads all weights once, which takes about as long as one decoding step.
    """
    found = reader_identity(model.config, params).differences(context.model)
    if found:
        raise ValueError(f"{name} is of another model: {found}")


def reader_identity(config: ModelConfig, params: Any) -> Identity:
    """The identity of a model as a reader: the ids that begin and end its texts do not matter."""
    return identity(dataclasses.replace(config, bos_id=None, eos_ids=()), params)


def extend(
    model: Transformer,
    params: Any,
    tokens: Int[np.ndarray, "B T"],
    lengths: Int[np.ndarray, " B"],
    cache: ModelCache,
    max_new_tokens: int,
) -> tuple[jax.Array, ModelCache]:
    """Reads more tokens after the text of a context, which every sequence of the batch continues.

    Args:
        tokens, lengths: prompts, right-padded, and their lengths.
        cache: cache of a batch of one; it stays unchanged.

    Returns:
        Logits after the last token of each sequence [B, V] fp32, and the cache of the batch, with
        room for `max_new_tokens`.
    """
    # Copy the cache for every sequence, with room for prompts and new tokens.
    (B, T), mesh = tokens.shape, mesh_of(params)
    placement = None if mesh is None else Placement.create(mesh, B)
    room, before = room_bucket(T + max_new_tokens), int(cache.lengths[0])
    rope_lengths = np.asarray(before + lengths + max_new_tokens, np.int32)
    device = params["embedding"].sharding
    rope_lengths = put_rows(rope_lengths, device, placement)
    whole = dataclasses.replace(
        grown(model.config, cache, B, room, placement), rope_lengths=rope_lengths
    )
    # Positions continue after the context.
    steps = np.arange(T, dtype=np.int32)[None]
    positions = np.where(steps < lengths[:, None], before + steps, -1).astype(np.int32)
    rows = put_rows((tokens.astype(np.int32), positions, lengths), device, placement)
    tokens_BT, positions_BT, lengths_B = rows
    # Run the layers without compression: prompts after a context are kept in full.
    x = embed_chunks(model.config, mesh, params["embedding"], tokens_BT)
    for index, kind in enumerate(block_kinds(model.config)):
        arrays = (x, positions_BT, whole[index], whole.rope_lengths)
        x, entry = run_layer(kind, params[f"layers_{index}"], *arrays, donate=True)
        whole = whole.with_layer(index, entry)
    top = {name: params[name] for name in output_params(model.config)}
    logits = last_logits(model.config, top, x, lengths_B)
    return logits, whole.advance(cache.lengths + lengths_B)


def grown(
    config: ModelConfig, cache: ModelCache, batch: int, room: int, placement: Placement | None
) -> ModelCache:
    """The cache of one sequence as a cache for a batch that continues it, with room for more."""
    windows = config.sliding_windows
    own: list[Any] = [None] * len(cache)
    rows: list[list[int]] = [[] for _ in cache.pools]
    for index, (layer, place) in enumerate(zip(cache.own, cache.places, strict=True)):
        if place is not None:
            rows[place[0]].append(index)
            continue
        # Round the slots in use up, so that contexts of similar length share programs.
        used = int(layer.used[0])
        held = repeated_with_room(layer, batch, bucket_rows(used) - used + room, windows[index])
        attention = config.layers[index].attention
        own[index] = held if placement is None else spread_layer(attention, held, placement)
    pools = tuple(
        grow_pool(pool, batch, room, tuple(windows[index] for index in layers), placement)
        for pool, layers in zip(cache.pools, rows, strict=True)
    )
    ways = 1 if placement is None else placement.ways
    copies = head_copies(cache.pools[0].kept.shape[2], ways) if pools else 1
    parts = {"own": tuple(own), "pools": pools, "placement": placement, "copies": copies}
    return dataclasses.replace(cache, **parts)


def on_devices_of(params: Any, cache: Any) -> Any:
    """The cache on the devices of the parameters; a cache elsewhere is copied to each of them."""
    wanted = getattr(params["embedding"], "sharding", None)
    if wanted is None:
        return cache
    if isinstance(wanted, NamedSharding):
        devices = jax.tree.leaves(cache)[0].sharding.device_set
        if devices == wanted.device_set:
            return cache
        wanted = NamedSharding(wanted.mesh, PartitionSpec())
    # Bind a file's arrays to the device: jax compiles a second program for arrays that are not.
    return jax.device_put(cache, wanted)


def _describe(value: Any, name: str, tensors: dict[str, np.ndarray]) -> Any:
    """A part of a cache as JSON. Arrays go to `tensors`; the JSON has their names."""
    if isinstance(value, jax.Array):
        tensors[name] = np.asarray(value)
        return {"tensor": name}
    if isinstance(value, tuple):
        return [_describe(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
    if dataclasses.is_dataclass(value):
        fields = {
            field.name: _describe(getattr(value, field.name), f"{name}.{field.name}", tensors)
            for field in dataclasses.fields(value)
        }
        return {"part": type(value).__name__, "fields": fields}
    return value


def _rebuild(value: Any, stored: Any) -> Any:
    """The inverse of `_describe`."""
    if isinstance(value, list):
        return tuple(_rebuild(item, stored) for item in value)
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return jnp.asarray(stored[value["tensor"]].open())
    fields = {name: _rebuild(item, stored) for name, item in value["fields"].items()}
    return PARTS[value["part"]](**fields)
