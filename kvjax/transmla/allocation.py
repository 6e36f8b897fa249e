"""Chooses rope_dim and rank of every layer by the loss of the model, at a fixed total cache."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.checks import COUNT, OVERFLOW, SIZE, check_params, check_ranges, token_ids
from kvjax.config import LayerConfig
from kvjax.nn import Transformer
from kvjax.nn.transformer import block_kind, embed, layer_output
from kvjax.transmla import rotary
from kvjax.transmla.calibration import Stats
from kvjax.transmla.closed_form import BEST, Recipe, close, published
from kvjax.transmla.layer import gqa_layers, over_heads, padded
from kvjax.transmla.sizes import Sizes, checked_stats, components, layer_sizes
from kvjax.transmla.streams import mean_loss

MOST = 3
"""Different sizes (rank and rope_dim) in a model: each is a kind of layer with its own programs."""

Changes = dict[int, Sizes]
"""New sizes of some layers."""


def allocate_sizes(
    model: Transformer,
    params: Mapping[str, Any],
    stats: Stats,
    tokens: Int[np.ndarray, "S T"],
    *,
    kv_rank: int,
    rope_dim: int,
    step: int,
    recipe: Recipe = BEST,
    rounds: int = 32,
) -> tuple[list[int], list[int]]:
    """Ranks and rope_dims of all layers whose mean cache is at most kv_rank + rope_dim numbers.

    The search starts with the same sizes in every layer. A round lets every layer trade rank
    against rope_dim, and then moves `step` numbers from the layer that loses least without them to
    the layer that gains most. Each change is measured as the loss of the whole converted model (in
    closed form) on `tokens`, and kept if it lowers the loss. The search ends when a round lowers
    nothing, or after `rounds`.

    Then pairs of sizes are merged until at most three are left (see `few_sizes`): each size is a
    kind of layer that compiles its own programs.

    Examples:
        >>> stats = kvjax.transmla.calibrate(model, params, batches[:1])
        >>> sizes = {"kv_rank": 12, "rope_dim": 4, "step": 4, "rounds": 1}
        >>> ranks, widths = kvjax.transmla.allocate_sizes(model, params, stats, ids[8:], **sizes)
        >>> sum(ranks) + sum(widths) <= 2 * (12 + 4)  # two layers
        True

    Args:
        kv_rank, rope_dim: the mean over the layers, and the sizes that the search starts with.
        stats: from `calibrate`, on other text than `tokens`.
        tokens: int32, the text on which the loss is measured. Report results on other text.
        step: granularity of ranks and rope_dims, even; 64 or 128 suits kernels.

    Returns:
        kv_rank and rope_dim for `to_decoupled`.

    Raises:
        ValueError: an odd step, or sizes that `to_decoupled` would refuse.
    """
    check_ranges({"step": step, "rounds": rounds}, {"step": COUNT, "rounds": SIZE})
    if step % 2:
        raise ValueError(f"step is {step}, expected an even number")
    bases = gqa_layers(model)
    stats = checked_stats(model, stats)
    sizes = layer_sizes(bases, stats.tokens.size, kv_rank, rope_dim, None)
    trial = _Trial(model, params, stats, tokens, recipe, sizes)
    for _ in range(rounds):
        before = trial.loss
        for layer in range(len(bases)):
            trades = [(step, -step), (-step, step)]
            trial.keep_best([{layer: size} for size in trial.moves(layer, trades)])
        trial.keep_best(list(_transfers(trial, step)))
        if trial.loss >= before:
            break
    sizes = few_sizes(trial.sizes, step, trial.possible, trial.measure)
    return [s.rank for s in sizes], [s.rope_dim for s in sizes]


def choose_rope_dim(
    model: Transformer,
    params: Mapping[str, Any],
    stats: Stats,
    tokens: Int[np.ndarray, "S T"],
    *,
    cache: int,
    candidates: Sequence[int] | None = None,
    recipe: Recipe = BEST,
) -> int:
    """The rope_dim with the least loss in a cache of `cache` numbers per token and layer.

    The loss is that of the closed form; the fits move the best rope_dim little.

    Examples:
        >>> stats = kvjax.transmla.calibrate(model, params, batches[:1])
        >>> width = kvjax.transmla.choose_rope_dim(model, params, stats, ids[8:], cache=16)
        >>> sizes = {"kv_rank": 16 - width, "rope_dim": width}  # for `to_decoupled`

    Args:
        stats, tokens, recipe: as in `allocate_sizes`.
        candidates: rope_dims to try; the rank is the rest of the cache. None: a sixth, a quarter, a
            third and a half of the cache, at most the number of rotating components of the keys.

    Raises:
        ValueError: no candidate, or sizes that `to_decoupled` would refuse.
    """
    stats, bases = checked_stats(model, stats), gqa_layers(model)
    if candidates is None:
        turning = max(components(base)[1] for base in bases)
        candidates = sorted({min(cache // share // 2 * 2, turning) for share in (6, 4, 3, 2)})
    if not candidates:
        raise ValueError("got no candidate for rope_dim")
    tokens = token_ids(tokens, model.config.vocab_size, "tokens")
    losses = []
    for width in candidates:
        sizes = layer_sizes(bases, stats.tokens.size, cache - width, width, None)
        losses.append(_closed_loss(model, params, stats, tokens, recipe, sizes))
    return candidates[int(np.argmin(losses))]


def _closed_loss(
    model: Transformer,
    params: Mapping[str, Any],
    stats: Stats,
    tokens: Int[np.ndarray, "S T"],
    recipe: Recipe,
    sizes: Sequence[Sizes],
) -> float:
    """The loss of the model that the closed form gives; inf if it is not finite."""
    x = embed(model.config, params, tokens)
    for index, (base, size) in enumerate(zip(gqa_layers(model), sizes, strict=True)):
        own = params[f"layers_{index}"]
        args = (base, own["attn"], stats.layers[index], size.rank, size.rope_dim, recipe)
        config, attn = over_heads(base, own["attn"], close(*args))
        layer = LayerConfig(config, model.config.layers[index].mlp)
        x = layer_output(block_kind(model.config, layer), {**own, "attn": attn}, x)
    return mean_loss(model, params, x, tokens)


def choose_fold(
    model: Transformer,
    params: Mapping[str, Any],
    stats: Stats,
    tokens: Int[np.ndarray, "S T"],
    *,
    kv_rank: int,
    rope_dim: int,
) -> int:
    """The FreqFold of the published method with the least loss, among all possible ones.

    Examples:
        >>> stats = kvjax.transmla.calibrate(model, params, batches[:1])
        >>> sizes = {"kv_rank": 12, "rope_dim": 4}
        >>> fold = kvjax.transmla.choose_fold(model, params, stats, ids[8:], **sizes)
        >>> recipe = kvjax.transmla.published(fold)

    Args:
        stats, tokens: as in `allocate_sizes`.

    Raises:
        ValueError: no fold is possible with this rope_dim.
    """
    bases = gqa_layers(model)
    sizes = layer_sizes(bases, checked_stats(model, stats).tokens.size, kv_rank, rope_dim, None)
    turning = {0 if base.rope is None else base.rope.dim // 2 for base in bases}
    possible = (set(rotary.possible_folds(f, rope_dim // 2)) for f in turning)
    folds = sorted(set.intersection(*possible))
    if not folds:
        raise ValueError(f"no FreqFold keeps {rope_dim // 2} of {sorted(turning)} frequencies")
    losses = [_Trial(model, params, stats, tokens, published(fold), sizes).loss for fold in folds]
    return folds[int(np.argmin(losses))]


def _transfers(trial: _Trial, step: int) -> Iterator[dict[int, Sizes]]:
    """Changes that take `step` numbers from one of the three layers that lose least without them,
    and give them to the layer that gains most."""
    layers = range(len(trial.sizes))

    def best(layer: int, sign: int) -> tuple[float, int, Sizes] | None:
        moves = trial.moves(layer, [(sign * step, 0), (0, sign * step)])
        losses = [(trial.measure({layer: size}), layer, size) for size in moves]
        return min(losses, key=lambda entry: entry[0], default=None)

    gains = sorted(filter(None, (best(layer, 1) for layer in layers)), key=lambda g: g[0])
    costs = sorted(filter(None, (best(layer, -1) for layer in layers)), key=lambda c: c[0])
    for _, receiver, larger in gains[:1]:
        for _, donor, smaller in [c for c in costs if c[1] != receiver][:3]:
            yield {receiver: larger, donor: smaller}


def few_sizes(
    sizes: Sequence[Sizes],
    step: int,
    possible: Callable[[int, Sizes], bool],
    measure: Callable[[Mapping[int, Sizes]], float],
    most: int = MOST,
) -> list[Sizes]:
    """Merges sizes until at most `most` different ones are left; the total cache does not grow.

    Every step merges the two sizes whose merger costs the least loss.

    Args:
        sizes: the size of every layer; they differ by multiples of `step`.
        possible: whether a layer can have a size.
        measure: the loss when some layers have other sizes than `sizes` says.

    Returns:
        The new size of every layer. More than `most` sizes are left only if layers have no possible
        size in common.
    """
    sizes, changes = list(sizes), Changes()
    while len(groups(sizes)) > most:
        choices = [
            merger
            for merger in mergers(sizes, step)
            if all(possible(layer, size) for layer, size in merger.items())
        ]
        if not choices:
            break
        best = min(choices, key=lambda choice: measure(changes | choice))
        changes |= best
        for layer, size in best.items():
            sizes[layer] = size
    return sizes


def groups(sizes: Sequence[Sizes]) -> dict[tuple[int, int], list[int]]:
    """The layers of each rank and rope_dim."""
    found: dict[tuple[int, int], list[int]] = {}
    for layer, size in enumerate(sizes):
        found.setdefault((size.rank, size.rope_dim), []).append(layer)
    return found


def mergers(sizes: Sequence[Sizes], step: int) -> Iterator[Changes]:
    """Every way to merge two sizes.

    The layers of both get the mean cache of all of them, rounded down to a multiple of the step,
    with a rope_dim from the smaller to the larger of the two.
    """
    for first, second in itertools.combinations(groups(sizes).items(), 2):
        (rank, rope), ours = first
        (other_rank, other_rope), theirs = second
        total = len(ours) * (rank + rope) + len(theirs) * (other_rank + other_rope)
        steps = (total // (len(ours) + len(theirs)) - rank - rope) // step
        low, high = sorted((rope, other_rope))
        for width in range(low, high + 1, step):
            size = (rank + rope + steps * step - width, width)
            yield {
                layer: dataclasses.replace(sizes[layer], rank=size[0], rope_dim=size[1])
                for layer in (*ours, *theirs)
                if (sizes[layer].rank, sizes[layer].rope_dim) != size
            }


class _Trial:
    """The converted model with the sizes chosen so far, its hidden states, and its loss.

    Every layer is padded with zeros to the largest possible latent and rotary key, so that no size
    compiles a new program.
    """

    def __init__(
        self,
        model: Transformer,
        params: Mapping[str, Any],
        stats: Stats,
        tokens: Int[np.ndarray, "S T"],
        recipe: Recipe,
        sizes: Sequence[Sizes],
    ):
        self.model, self.params, self.stats, self.recipe = model, params, stats, recipe
        self.tokens = token_ids(tokens, model.config.vocab_size, "tokens")
        self.sizes = list(sizes)
        self.layers = [self._convert(index, size) for index, size in enumerate(sizes)]
        self.hidden = [embed(model.config, params, tokens)]
        self.hidden += self._run(0, {})
        self.loss = self._loss(self.hidden[-1])
        if not np.isfinite(self.loss):
            check_params(params)
            raise ValueError(f"the converted model's loss is {self.loss}: {OVERFLOW}")

    def moves(self, layer: int, changes: Sequence[tuple[int, int]]) -> list[Sizes]:
        """The possible sizes of a layer after changes of (rank, rope_dim)."""
        now = self.sizes[layer]
        moved = [
            dataclasses.replace(now, rank=now.rank + rank, rope_dim=now.rope_dim + rope)
            for rank, rope in changes
        ]
        return [size for size in moved if self.possible(layer, size)]

    def possible(self, layer: int, size: Sizes) -> bool:
        """Whether the keys and values of a layer have enough components for a size."""
        whole, turning = components(gqa_layers(self.model)[layer])
        return 0 <= size.rope_dim <= turning and 1 <= size.rank <= whole - size.rope_dim

    def measure(self, changes: Mapping[int, Sizes]) -> float:
        """The loss with other sizes in some layers."""
        layers = {index: self._convert(index, size) for index, size in changes.items()}
        return self._loss(self._run(min(layers), layers)[-1])

    def keep_best(self, choices: Sequence[Mapping[int, Sizes]]) -> None:
        """Makes the change with the least loss, if it lowers the loss."""
        measured = [(self.measure(choice), index) for index, choice in enumerate(choices)]
        loss, index = min(measured, default=(self.loss, -1))
        if loss >= self.loss:
            return
        for layer, size in choices[index].items():
            self.sizes[layer], self.layers[layer] = size, self._convert(layer, size)
        # Layers before the first changed one keep their hidden states.
        first = min(choices[index])
        self.hidden[first + 1 :] = self._run(first, {})
        self.loss = loss

    def _convert(self, index: int, size: Sizes) -> tuple[LayerConfig, dict[str, Any]]:
        base, own = gqa_layers(self.model)[index], self.params[f"layers_{index}"]
        stats = self.stats.layers[index]
        layer = close(base, own["attn"], stats, size.rank, size.rope_dim, self.recipe)
        config, attn = over_heads(base, own["attn"], padded(base, layer))
        return LayerConfig(config, self.model.config.layers[index].mlp), {**own, "attn": attn}

    def _run(self, first: int, changed: Mapping[int, Any]) -> list[jax.Array]:
        """The outputs of all layers from `first` to the last."""
        outputs, x = [], self.hidden[first]
        for index in range(first, len(self.layers)):
            layer, params = changed.get(index, self.layers[index])
            x = layer_output(block_kind(self.model.config, layer), params, x)
            outputs.append(x)
        return outputs

    def _loss(self, hidden: Float[Array, "S T D"]) -> float:
        return mean_loss(self.model, self.params, hidden, self.tokens)
