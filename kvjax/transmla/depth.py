"""How many layers keep their fits: the number with the least loss on text that no fit reads.

Least squares lower the error of a layer on the text that they read. In the first layers the error
falls for other text too, and all later layers gain. In later layers the fits of a short text can
raise the loss. So the fits end at the depth where held-out text has the least loss, and the layers
after it keep the closed form. Depth 0 is the closed form of the whole model, so the fits never end
above its held-out loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.config import AttentionConfig, LayerConfig
from kvjax.nn import Transformer
from kvjax.nn.transformer import embed
from kvjax.transmla.streams import mean_loss, replay

HELD_OUT = 8
"""One calibration sequence in HELD_OUT is held out."""
JUDGES = 8
"""Most sequences of the calibration text that are judged."""
MISSES = 2
"""Measured depths after the best one before the search ends."""

Attention = tuple[AttentionConfig, dict[str, Any]]
"""The attention of a converted layer: configuration and parameters."""


def divided(tokens: Int[np.ndarray, "S T"]) -> tuple[np.ndarray, np.ndarray]:
    """The sequences to fit and the ones to judge with, spread over the text.

    A single sequence is fitted, and none is left to judge.
    """
    judges = np.arange(len(tokens)) % HELD_OUT == HELD_OUT - 1
    if len(tokens) > 1 and not judges.any():
        judges[-1] = True
    held = tokens[judges]
    return tokens[~judges], held[:: -(-len(held) // JUDGES) or 1]


def depths(layers: int) -> list[int]:
    """The depths that are measured: 0, 1, 2, 4, 8 … and all layers."""
    return [0, *(1 << power for power in range(layers.bit_length()) if 1 << power < layers), layers]


def best_depth(losses: Mapping[int, float]) -> int:
    """The depth with the least loss, of those before the search ends.

    Args:
        losses: by depth, in the order of `depths`.
    """
    seen = dict[int, float]()
    for depth, loss in losses.items():
        seen[depth] = loss
        if _ended(seen):
            break
    return min(seen, key=lambda depth: seen[depth])


def _ended(losses: Mapping[int, float]) -> bool:
    """Whether the last MISSES losses are no better than one before."""
    values = list(losses.values())
    return values.index(min(values)) < len(values) - MISSES


class FittedDepth:
    """Measures depths while layers are fitted, so that no layer is fitted in vain.

    Attributes:
        best: the number of first layers that keep their fits.
        losses: the held-out loss of each measured depth, from 0.
    """

    def __init__(
        self,
        model: Transformer,
        params: Mapping[str, Any],
        closed: Sequence[Attention],
        tokens: Int[np.ndarray, "H T"],
    ):
        """Measures the closed form.

        Args:
            closed: every layer in closed form.
            tokens: the held-out text; if it has no sequences, all fits are kept.
        """
        self.model, self.params, self.closed, self.tokens = model, params, closed, tokens
        self.done, self.best, self.losses = 0, 0, dict[int, float]()
        if len(tokens):
            self._hidden = embed(model.config, params, tokens)
            self.losses[0] = self._loss()

    def add(self, fitted: Attention) -> bool:
        """Takes the next fitted layer; returns whether to fit another one."""
        self.done += 1
        last = self.done == len(self.closed)
        if not len(self.tokens):
            self.best = self.done
            return not last
        self._hidden = self._run(self.done - 1, fitted, self._hidden)
        if self.done in depths(len(self.closed)):
            self.losses[self.done] = self._loss()
            self.best = best_depth(self.losses)
        return not last and not _ended(self.losses)

    def _loss(self) -> float:
        """The loss with the layers so far fitted and all others in closed form."""
        x = self._hidden
        for index in range(self.done, len(self.closed)):
            x = self._run(index, self.closed[index], x)
        return mean_loss(self.model, self.params, x, self.tokens)

    def _run(
        self, index: int, attention: Attention, x: Float[Array, "H T D"]
    ) -> Float[Array, "H T D"]:
        """The text after one layer with another attention."""
        config, attn = attention
        layer = LayerConfig(config, self.model.config.layers[index].mlp)
        own = {**self.params[f"layers_{index}"], "attn": attn}
        return replay(self.model.config, layer, own, x)
