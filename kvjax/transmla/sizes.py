"""Ranks and rope_dims of decoupled layers, checked against the model and the calibration text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvjax.checks import COUNT, Range, check_finite, check_ranges, optional, token_ids
from kvjax.config import AttentionConfig, DecoupledConfig, GQAConfig, RopeConfig, SelectedPairs
from kvjax.nn import Transformer
from kvjax.transmla import rotary
from kvjax.transmla.calibration import Stats
from kvjax.transmla.closed_form import Recipe
from kvjax.transmla.layer import folded_config, gqa_layers

LATENT = 448, 128
"""kv_rank and rope_dim of large models, as published (arXiv 2502.07864): 576 numbers a token."""
ROTATING = 4
"""One cached number in ROTATING rotates where no moments are at hand to choose rope_dim by."""
SHARES = (1 / 8, 1 / 6, 1 / 5, 1 / 4, 1 / 3, 1 / 2, 2 / 3)
"""Shares of the cached numbers that a conversion may let rotate."""
CACHE = optional(Range(above=0, most=1))
"""What `cache` may be."""

Widths = int | Sequence[int]
"""One number for all layers, or one for each layer."""


@dataclass(frozen=True)
class Sizes:
    """The widths of one decoupled layer.

    Attributes:
        rank, rope_dim: widths of the latent and of the rotary key: what the cache holds.
        v_head_dim: width of a head's output before the output projection.
    """

    rank: int
    rope_dim: int
    v_head_dim: int


def chosen_widths(
    bases: Sequence[GQAConfig],
    cache: float | None,
    kv_rank: Widths | None,
    rope_dim: Widths | None,
    exportable: bool,
) -> tuple[Widths, Widths]:
    """kv_rank and rope_dim, where the caller may leave out one of them or both.

    Args:
        bases: the attention of every layer.
        cache: the share of a token's keys and values that may be cached instead of kv_rank.
        kv_rank: None: what rope_dim leaves of the cache. Without `cache` that is 448 + 128 numbers
            as published, or half of keys and values that have no more numbers than that.
        rope_dim: None: a quarter of the cached numbers (128 of 448 + 128). Conversions choose it by
            the moments of the calibration instead, see `rope_dims_to_choose`.
        exportable: choose a rope_dim that divides the rotating width of a head.

    Raises:
        ValueError: `cache` is out of range, leaves no rank, or comes together with kv_rank.
    """
    check_ranges({"cache": cache}, {"cache": CACHE})
    if kv_rank is not None and cache is not None:
        raise ValueError(f"cache is {cache} and kv_rank is {kv_rank}, expected one of the two")
    wholes = [components(base)[0] for base in bases]
    if kv_rank is None and cache is None and min(wholes) > sum(LATENT):
        kv_rank = LATENT[0]
        if rope_dim is None:
            return kv_rank, _default_rope_dim(bases, LATENT[1], exportable)
    if kv_rank is not None:
        if rope_dim is None:
            rank = max(_per_layer("kv_rank", kv_rank, bases))
            most = min(rank // (ROTATING - 1), min(wholes) - rank)
            rope_dim = _default_rope_dim(bases, most, exportable)
        return kv_rank, rope_dim
    numbers = [int((0.5 if cache is None else cache) * whole) for whole in wholes]
    if rope_dim is None:
        rope_dim = _default_rope_dim(bases, min(numbers) // ROTATING, exportable)
    ropes = _per_layer("rope_dim", rope_dim, bases)
    ranks = [n - rope for n, rope in zip(numbers, ropes, strict=True)]
    if min(ranks) < 1:
        raise ValueError(
            f"a cache of {min(numbers)} numbers a token has no room for rope_dim {rope_dim} and a "
            "kv_rank"
        )
    return ranks if len(set(ranks)) > 1 else ranks[0], rope_dim


def rope_dims_to_choose(
    bases: Sequence[GQAConfig],
    cache: float | None,
    kv_rank: Widths | None,
    rope_dim: Widths | None,
    exportable: bool,
) -> tuple[int, list[int]]:
    """Cached numbers of a token and layer, and the rope_dims from which a conversion chooses one.

    The arguments are those of `chosen_widths`. There is nothing to choose, (0, []), where rope_dim
    or kv_rank is given, where the widths are those published, or where layers have caches of
    different widths.
    """
    wholes = {components(base)[0] for base in bases}
    turning = max(components(base)[1] for base in bases)
    published = cache is None and min(wholes) > sum(LATENT)
    if kv_rank is not None or rope_dim is not None or published or len(wholes) > 1 or not turning:
        return 0, []
    numbers = int((0.5 if cache is None else cache) * min(wholes))
    if exportable:
        full = max(0 if base.rope is None else base.rope.dim for base in bases)
        widths = {w for w in range(2, full + 1, 2) if full % w == 0}
    else:
        widths = {min(int(numbers * share) // 2 * 2, turning) for share in SHARES}
    return numbers, sorted(w for w in widths if 2 <= w <= numbers * SHARES[-1])


def _default_rope_dim(bases: Sequence[GQAConfig], most: int, exportable: bool) -> int:
    """The largest rope_dim up to `most` that the layers can have."""
    if exportable:
        full = max(0 if base.rope is None else base.rope.dim for base in bases)
        return max((w for w in range(2, full + 1, 2) if full % w == 0 and w <= most), default=2)
    return max(min(most // 2 * 2, max(components(base)[1] for base in bases)), 0)


def layer_sizes(
    bases: Sequence[GQAConfig],
    tokens: int,
    kv_rank: Widths,
    rope_dim: Widths,
    v_head_dim: int | None,
) -> list[Sizes]:
    """The sizes of every layer.

    Args:
        bases: the attention of every layer.
        tokens: number of tokens in the calibration.
        kv_rank, rope_dim, v_head_dim: as in `to_decoupled`.

    Raises:
        ValueError: a list that has not one number for each layer; a rope_dim that is odd or larger
            than the key components with RoPE; a rank below 1, above the number of remaining
            components, or above the number of tokens.
    """
    check_ranges({"v_head_dim": v_head_dim}, {"v_head_dim": optional(COUNT)})
    ranks, ropes = _per_layer("kv_rank", kv_rank, bases), _per_layer("rope_dim", rope_dim, bases)
    sizes = []
    for index, (base, rank, width) in enumerate(zip(bases, ranks, ropes, strict=True)):
        whole, turning = components(base)
        width = width if turning else 0
        if width % 2 or not 0 <= width <= turning:
            raise ValueError(
                f"layer {index}: rope_dim is {width}, expected an even number up to {turning}"
            )
        most = whole - width
        if not 1 <= rank <= most:
            raise ValueError(
                f"layer {index}: kv_rank is {rank}, expected 1 to {most} = 2·{base.num_kv_heads}·"
                f"{base.head_dim} − {width} (what the keys and values have)"
            )
        if tokens < rank:
            raise ValueError(
                f"the calibration has {tokens} tokens, expected at least {rank}: the kv_rank"
            )
        sizes.append(Sizes(rank, width, base.head_dim if v_head_dim is None else v_head_dim))
    return sizes


def components(base: GQAConfig) -> tuple[int, int]:
    """The number of components of all keys and values of a token, and of keys with RoPE in them."""
    turning = 0 if base.rope is None else base.num_kv_heads * base.rope.dim
    return 2 * base.num_kv_heads * base.head_dim, turning


def _per_layer(name: str, value: Widths, bases: Sequence[GQAConfig]) -> list[int]:
    each = isinstance(value, Sequence | np.ndarray) and not isinstance(value, str)
    values: list[Any] = list(value) if each else [value] * len(bases)  # type: ignore[arg-type]
    if len(values) != len(bases):
        raise ValueError(f"got {len(values)} values of {name}, expected one or {len(bases)}")
    named = {f"{name}[{i}]": v for i, v in enumerate(values)} if each else {name: value}
    check_ranges(named, dict.fromkeys(named, Range(whole=True)))
    return [int(value) for value in values]


def checked_stats(model: Transformer, stats: Stats) -> Stats:
    """Checks that the calibration belongs to this model, and returns it.

    Raises:
        ValueError: its shapes or its tokens are another model's, or a moment is NaN.
    """
    if not isinstance(stats, Stats):
        raise ValueError(
            f"stats is {type(stats).__name__}, expected what kvjax.transmla.calibrate returns, or "
            "Stats.load reads"
        )
    for index, layer in enumerate(stats.layers):
        check_finite(vars(layer), f"stats: layer {index}: ")
    token_ids(stats.tokens, model.config.vocab_size, "stats")
    got = [len(layer.kv_mean) for layer in stats.layers]
    bases = gqa_layers(model)
    want = [2 * base.num_kv_heads * base.head_dim for base in bases]
    if got != want:
        raise ValueError(
            f"the calibration has {len(got)} layers of {sorted(set(got))} numbers, expected "
            f"{len(want)} of {sorted(set(want))}: it was made with another model"
        )
    return stats


def check_query_rank(model: Transformer, stats: Stats, q_rank: int, mode: str) -> None:
    """Checks that the query projections can be cut to a rank.

    Raises:
        ValueError: a rank out of range, layers that cannot be folded, or stats without the
            moments of the attention's input.
    """
    width = model.config.hidden_size
    check_ranges({"q_rank": q_rank}, {"q_rank": COUNT})
    if not 1 <= q_rank <= width:
        raise ValueError(f"q_rank is {q_rank}, expected 1 to {width}")
    if mode == "post" or any(base.qk_norm is not None for base in gqa_layers(model)):
        raise ValueError("q_rank is given, expected mode='fold' and layers without QK-norm with it")
    if any(layer.input_second is None for layer in stats.layers):
        raise ValueError(
            "q_rank is given with stats without the moments of the inputs, expected stats of "
            "calibrate(…, input_moments=True)"
        )


def exportable_recipe(
    recipe: Recipe, bases: Sequence[GQAConfig], rope_dim: int | Sequence[int]
) -> Recipe:
    """The recipe with one rotating component for each of rope_dim / 2 evenly spaced frequencies.

    Raises:
        ValueError: a rope_dim that differs between layers, or does not divide the number of
            rotating components of a head.
    """
    # Stock loaders compute evenly spaced frequencies from one rope_dim.
    widths = set(np.ravel(rope_dim).tolist())
    turning = {0 if base.rope is None else base.rope.dim for base in bases}
    if len(widths) != 1 or len(turning) != 1:
        raise ValueError(
            f"an exportable model has one rope_dim, got {sorted(widths)} for {sorted(turning)}"
        )
    width, full = widths.pop(), turning.pop()
    if width < 2 or full % width:
        raise ValueError(f"rope_dim is {width}, expected a divisor of {full} to be exportable")
    return dataclasses.replace(recipe, placement=rotary.every(full // width))


def decoupled_shape(model: Transformer, kv_rank: int, rope_dim: int) -> Transformer:
    """The model that `to_decoupled` gives with these sizes, without converting any weight.

    The rotating components are the first ones, not those that a calibration would choose.

    Raises:
        ValueError: a layer that is not GQA, or sizes that its keys and values don't have.
    """
    configs = tuple(_layer_shape(base, kv_rank, rope_dim) for base in gqa_layers(model))
    return Transformer(model.config.with_attention(configs))


def _layer_shape(base: GQAConfig, kv_rank: int, rope_dim: int) -> AttentionConfig:
    most, turning = components(base)
    width = min(rope_dim, turning)
    if width % 2 or kv_rank < 1 or kv_rank + width > most:
        raise ValueError(
            f"got kv_rank {kv_rank} and rope_dim {rope_dim}, expected an even rope_dim and at most "
            f"{most} in all: 2·{base.num_kv_heads}·{base.head_dim}"
        )
    rope = None
    # Real conversions choose their pairs; here they only have to be valid.
    if base.rope is not None and width:
        pairs = tuple(index % (base.rope.dim // 2) for index in range(width // 2))
        selected = SelectedPairs(base.rope, pairs)
        rope = RopeConfig(width, base.rope.theta, selected, base.rope.interleaved)
    if base.qk_norm is None:
        return folded_config(base, kv_rank, rope, base.head_dim)
    return DecoupledConfig(base, kv_rank, rope, base.head_dim, out_bias=True)
