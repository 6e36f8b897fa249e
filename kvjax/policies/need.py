"""Budgets from measured need: how much the answer suffers when one head keeps few tokens.

Importance says where an answer's attention falls. It does not say how many tokens a head needs, nor
does it see the heads that only prepare a retrieval. A curve of need measures both:
`kvjax.headkv.measure_need` makes the curves, once per model, and `need_caps` divides a budget.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64, Int, Int32

from kvjax.config import ModelConfig
from kvjax.fields import Number, Object, Size, object_problems, refuse, within
from kvjax.paths import local_path
from kvjax.policies.budgets import HeadImportance, Request, largest_remainder, water_fill
from kvjax.policies.importance import beside, check_heads
from kvjax.runs import write_json
from kvjax.text_files import read_object

FORMAT = 1
Table = list[list[list[Number]]]
FIELDS = {"format": Literal[FORMAT], "sizes": list[Size], "rises": Table, "errors": Table}
"""Fields of a file of curves, besides the origin of the numbers."""
COMMON = 0.1
"""Weight of the mean over all heads in each head's curve: other prompts may need other heads. So
every head gets some tokens before the last doubtful ones go to the heads with measured need."""


@dataclass(frozen=True, eq=False)
class NeedCurves:
    """For each KV head, the loss of an answer against the number of tokens that the head keeps.

    Examples:
        >>> rises = np.array([[[9.0, 0.5, 0.0], [0.1, 0.0, 0.0]]])  # one layer, two KV heads
        >>> curves = kvjax.headkv.NeedCurves(np.array([0, 16, 512]), rises, 0 * rises)
        >>> curves.falls[0, 0] > curves.falls[0, 1]  # tokens help the first head more
        array([ True,  True])
        >>> curves.save("heads.need.json")  # beside heads.json, where headkv finds it

    Attributes:
        sizes: [P] tokens that the head keeps besides the recent ones; rising from 0. The last one
            stands for the whole prompt.
        rises: [L, K, P] mean rise of an answer's negative log-likelihood, nats per answer, over the
            loss when this head keeps the whole prompt.
        errors: [L, K, P] standard errors of the rises.
        meta: origin of the numbers: model, scorer, number and kinds of the prompts.
    """

    sizes: Int[np.ndarray, " P"]
    rises: Float64[np.ndarray, ...]
    errors: Float64[np.ndarray, ...]
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        sizes, rises, errors = self.sizes, self.rises, self.errors
        if sizes.ndim != 1 or len(sizes) < 2 or sizes[0] != 0 or (np.diff(sizes) <= 0).any():
            raise ValueError(f"sizes are {sizes.tolist()}, expected rising sizes from 0")
        if rises.ndim != 3 or rises.shape[2] != len(sizes) or errors.shape != rises.shape:
            raise ValueError(
                f"rises are {rises.shape} and errors {errors.shape}, expected [layers, heads, "
                f"{len(sizes)}] both"
            )
        if not np.isfinite(rises).all() or not np.isfinite(errors).all() or (errors < 0).any():
            raise ValueError("rises or errors are not finite, expected finite numbers, errors >= 0")

    @functools.cached_property
    def falls(self) -> Float64[np.ndarray, "L K steps"]:
        """Fall of the loss per token between two sizes; never negative, and never rising.

        The falls are those of the lower convex hull: the first tokens of a head that needs eight at
        once are worth an eighth of what the eight are worth.
        """
        values = np.minimum.accumulate(np.maximum(self.rises, 0.0), axis=2)
        values = (1 - COMMON) * values + COMMON * values.mean(axis=(0, 1))
        hull = values.copy()
        for i in range(len(self.sizes)):
            for k in range(i + 2, len(self.sizes)):
                inner = self.sizes[i + 1 : k]
                part = (inner - self.sizes[i]) / (self.sizes[k] - self.sizes[i])
                chord = values[..., i, None] * (1 - part) + values[..., k, None] * part
                hull[..., i + 1 : k] = np.minimum(hull[..., i + 1 : k], chord)
        return -np.diff(hull, axis=2) / np.diff(self.sizes)

    def save(self, path: str | Path) -> None:
        """Writes the curves as one JSON file, atomically."""
        write_json(
            local_path(path, "the file of need curves"),
            {
                "format": FORMAT,
                "sizes": self.sizes.tolist(),
                "rises": self.rises.tolist(),
                "errors": self.errors.tolist(),
                "meta": self.meta,
            },
        )


def need_path(path: str | Path) -> Path:
    """The file of curves beside a score file: heads.need.json for heads.json or heads.json.gz."""
    plain = beside(path, "")
    return plain.with_name(f"{plain.name.removesuffix('.need')}.need.json")


def load_need(path: str | Path, model_config: ModelConfig | None = None) -> NeedCurves:
    """Reads a file of need curves.

    Examples:
        >>> rises = np.zeros((2, 2, 3))
        >>> curves = kvjax.headkv.NeedCurves(np.array([0, 16, 512]), rises, rises)
        >>> curves.save("mine.need.json")
        >>> kvjax.headkv.load_need("mine.need.json").sizes
        array([  0,  16, 512])

    Args:
        model_config: configuration of the model that the curves are for; its shape is checked.

    Raises:
        ValueError: the file does not exist or has another format, or the shapes differ.
    """
    path = local_path(path, "the file of need curves")
    if not path.is_file():
        raise ValueError(f"no file of need curves at {path}")
    held = read_object(path)
    refuse(object_problems(held, FIELDS, optional={"meta": Object}, others=False), str(path))
    with within(path):
        rises, errors = (np.asarray(held[name], np.float64) for name in ("rises", "errors"))
        curves = NeedCurves(
            np.asarray(held["sizes"], np.int64), rises, errors, held.get("meta", {})
        )
    if model_config is not None:
        check_curves(curves, model_config, str(path))
    return curves


def check_curves(curves: NeedCurves, config: ModelConfig, name: str = "need curves") -> None:
    """Raises ValueError unless the curves have the model's number of layers and KV heads."""
    expected = config.num_layers, config.budget_heads
    check_heads(curves.rises.shape[:2], expected, f"{name}: curves", "KV heads")


def need_caps(
    curves: NeedCurves, budget: int, limits: Int[np.ndarray, "L 1"]
) -> Int32[np.ndarray, "L K"]:
    """Budgets with the sum Σ min(budget, layer's limit), given where they lower the loss the most.

    Tokens are given in the order of the steepest fall per token, over all heads. What is left when
    no measured loss falls any more is divided evenly.
    """
    falls = curves.falls
    most = np.broadcast_to(limits, falls.shape[:2]).astype(np.int64)
    total = min(budget * most.size, int(most.sum()))
    # The tokens of each step between two sizes that a head can use.
    tokens = np.clip(most[..., None] - curves.sizes[:-1], 0, np.diff(curves.sizes))
    useful = np.where(falls > 0, tokens, 0).reshape(-1)
    # Falls of a head never rise, so a stable sort keeps its steps in order.
    order = np.argsort(-falls.reshape(-1), kind="stable")
    before = np.cumsum(useful[order]) - useful[order]
    given = np.zeros_like(useful)
    given[order] = np.clip(total - before, 0, useful[order])
    caps = given.reshape(falls.shape).sum(axis=2).astype(np.float64)
    even = np.full_like(caps, 1 / caps.size)
    caps = water_fill(caps + (total - caps.sum()) * even, even, most, total)
    return largest_remainder(caps, total)


@dataclass(frozen=True)
class MeasuredNeed:
    """Budgets from curves of need, see `need_caps`; with importance the mean of both budgets.

    Curves see what a head is needed for on the prompts that were measured. Importance also gives
    tokens to heads that those prompts could spare, such as the heads that copy longer answers.
    """

    curves: NeedCurves
    importance: HeadImportance | None = None

    def __call__(self, request: Request) -> Int32[np.ndarray, "L K"]:
        caps = need_caps(self.curves, request.budget, request.limits)
        if self.importance is None:
            return caps
        mean = (caps.astype(np.float64) + self.importance(request)) / 2
        return largest_remainder(mean, int(caps.sum()))

    def of_layers(self, depth: int) -> MeasuredNeed:
        """The same for the first `depth` layers."""
        c, importance = self.curves, self.importance
        curves = NeedCurves(c.sizes, c.rises[:depth], c.errors[:depth], c.meta)
        return MeasuredNeed(curves, None if importance is None else importance.of_layers(depth))
