"""Files of head importance: one number per head and sample, in the format of HeadKV's published
files."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Le
from jaxtyping import Float64

from kvjax.config import ModelConfig
from kvjax.fields import Says, refuse, shown, violations, within
from kvjax.paths import local_path
from kvjax.runs import write_whole
from kvjax.text_files import read_object


@dataclass(frozen=True, eq=False)
class HeadScores:
    """The importance of each query head: how much it contributes to the answers of samples.

    In this name, in `load_scores` and in the names of files, a score is the importance of a head on
    one sample. Token scores (kvjax/policies/scorers.py) are something else.

    Attributes:
        samples: [L, N, samples] float64, one number per head and accepted sample.
        meta: origin of the numbers: model, L, N, K, estimator, seed, provenance of each sample.
    """

    samples: Float64[np.ndarray, "L N samples"]
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if not isinstance(self.samples, np.ndarray):
            raise ValueError(f"head scores are {type(self.samples).__name__}, expected an array")
        if self.samples.ndim != 3 or self.samples.shape[2] == 0:
            raise ValueError(
                f"head scores have shape {self.samples.shape}, expected [layers, heads, samples] "
                "with at least one sample"
            )
        # Check all scores here, so that allocators can rely on finite numbers ≥ 0.
        bad = ~np.isfinite(self.samples).all(axis=2) | (self.samples < 0).any(axis=2)
        if bad.any():
            layer, head = np.argwhere(bad)[0]
            raise ValueError(
                f"{bad.sum()} heads have scores that are negative or not finite, "
                f"the first is layer {layer} head {head}; expected finite scores >= 0"
            )

    @property
    def mean(self) -> Float64[np.ndarray, "L N"]:
        """The importance of each query head: the mean over the samples."""
        return self.samples.mean(axis=2)

    @property
    def ranked(self) -> list[tuple[int, int]]:
        """All heads as (layer, query head), the most important first."""
        order = np.argsort(-self.mean, axis=None, kind="stable")
        layers, heads = np.unravel_index(order, self.samples.shape[:2])
        return list(zip(layers.tolist(), heads.tolist(), strict=True))

    def save(self, path: str | Path) -> None:
        """Writes the score file (packed if the name ends in .gz) and its meta file, atomically.

        Raises:
            ValueError: the path is a URL.
        """
        path = local_path(path, "the score file")
        layers, heads, _ = self.samples.shape
        table = {
            f"{layer}-{head}": self.samples[layer, head].tolist()
            for layer in range(layers)
            for head in range(heads)
        }
        write_whole(path, json.dumps(table))
        meta = self.meta | {"num_layers": layers, "num_heads": heads}
        write_whole(meta_path(path), json.dumps(meta))


def load_scores(path: str | Path, model_config: ModelConfig | None = None) -> HeadScores:
    """Reads a score file, ours or a published one; keys may come in any order.

    Args:
        path: a .json or .json.gz file. The meta file beside it is read if it exists.
        model_config: configuration of the model that the scores are for; its shape is checked.

    Raises:
        ValueError: the file does not exist or has another format, or the shapes differ.
    """
    path = local_path(path, "the score file")
    if not path.is_file():
        raise ValueError(f"no head score file at {path}")
    return _read_scores(path, model_config)


def default_scores(config: ModelConfig) -> HeadScores | None:
    """The head scores in the directory of the model's weights; None if there are none.

    For a model that was loaded by the path of a GGUF file, it is the directory of the file.
    """
    source = Path(config.source)
    path = (source.parent if source.is_file() else source) / "head_scores.json"
    return _read_scores(path, config) if config.source and path.is_file() else None


def _read_scores(path: Path, model_config: ModelConfig | None) -> HeadScores:
    """The scores in a file that exists; see `load_scores`."""
    meta = meta_path(path)
    samples, about = _samples(path), read_object(meta) if meta.is_file() else {}
    with within(path):
        scores = HeadScores(samples, about)
    if model_config is not None:
        check_shape(scores, model_config, str(path))
    return scores


def check_shape(scores: HeadScores, model_config: ModelConfig, name: str = "head scores") -> None:
    """Raises ValueError unless the scores have the model's number of layers and heads."""
    expected = model_config.num_layers, model_config.query_heads
    check_heads(scores.samples.shape[:2], expected, f"{name}: scores", "heads")


def check_heads(
    got: tuple[int, ...], expected: tuple[int, int], what: str, heads: str = "heads"
) -> None:
    """Raises ValueError unless `got` layers and heads are those that the model has."""
    if got != expected:
        raise ValueError(
            f"{what} of {got[0]} layers x {got[1]} {heads}, "
            f"expected {expected[0]} layers x {expected[1]} {heads} as the model has"
        )


def beside(path: str | Path, ending: str) -> Path:
    """A file of the same name: heads{ending} for heads.json or heads.json.gz."""
    path = Path(path)
    return path.with_name(path.name.removesuffix(".gz").removesuffix(".json") + ending)


def meta_path(path: str | Path) -> Path:
    """The meta file of a score file: heads.meta.json for heads.json or heads.json.gz."""
    return beside(path, ".meta.json")


Score = Annotated[float, Ge(0), Le(sys.float_info.max), Says("a finite number of at least 0")]
HEAD = re.compile(r"[0-9]{1,6}-[0-9]{1,6}")
"""A key of a score file."""


def _samples(path: Path) -> np.ndarray:
    table = read_object(path)
    names = (f"got the key {shown(key)}" for key in table if not HEAD.fullmatch(key))
    refuse(names, str(path), ", expected 'layer-head' such as '0-12'")
    kinds = dict.fromkeys(table, list[Score])
    refuse((line for _, line in violations(table, kinds, "head ")), str(path))
    if not table:
        raise ValueError(f"{path} has no heads, expected lists of scores by 'layer-head'")
    # Two keys may name one head ("0-1", "00-1"): compare both counts with the full table.
    keys = {tuple(int(part) for part in key.split("-", 1)): key for key in table}
    layers, heads = (max(axis) + 1 for axis in zip(*keys, strict=True))
    if len(keys) != layers * heads or len(keys) != len(table):
        raise ValueError(
            f"{path}: {len(table)} heads, expected {layers} layers x {heads} heads = "
            f"{layers * heads}"
        )
    counts = sorted({len(values) for values in table.values()})
    if len(counts) != 1:
        raise ValueError(f"{path}: heads have {counts} samples, expected the same for all")
    rows = [[table[keys[layer, head]] for head in range(heads)] for layer in range(layers)]
    return np.asarray(rows, dtype=np.float64)


def split_half(scores: HeadScores, splits: int = 20) -> float:
    """Spearman correlation of the heads' means over two random halves, averaged over `splits`.

    Returns:
        At most 1; NaN for fewer than two samples, or if all heads are equal.
    """
    count = scores.samples.shape[2]
    if count < 2:
        return float("nan")
    rng = np.random.default_rng(0)
    correlations = []
    for _ in range(splits):
        order = rng.permutation(count)
        halves = (order[: count // 2], order[count // 2 :])
        correlations.append(spearman(*(scores.samples[:, :, half].mean(axis=2) for half in halves)))
    return float(np.mean(correlations))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation. Equal values share their mean rank; NaN if a or b is constant."""
    x, y = (_ranks(values) for values in (a, b))
    if x.std() == 0 or y.std() == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    # Equal values get the mean of the ranks that they occupy.
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(sizes)
    return (ends - (sizes - 1) / 2)[group.reshape(-1)]
