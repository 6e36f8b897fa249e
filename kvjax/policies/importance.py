"""Files of head importance: one number for each head and sample, as HeadKV's published files have
them."""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from kvjax.config import ModelConfig
from kvjax.paths import local_path

MOST_NAMED = 3
"""Heads that an error about a score file names."""


@dataclass(frozen=True, eq=False)
class HeadScores:
    """How much each query head contributes to the answers of a set of samples.

    Attributes:
        samples: [L, N, samples] float64, one score a head and accepted sample.
        meta: where they come from: model, L, N, K, estimator, seed, provenance of each sample.
    """

    samples: Float64[np.ndarray, "L N samples"]
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.samples.ndim != 3 or self.samples.shape[2] == 0:
            raise ValueError(
                f"head scores have shape {self.samples.shape}, expected [layers, heads, samples] "
                "with at least one sample"
            )
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

    def save(self, path: str | Path) -> None:
        """Writes the score file (gzipped if the name ends in .gz) and its meta companion.

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
        _write_json(path, table)
        meta = self.meta | {"num_layers": layers, "num_heads": heads}
        _write_json(meta_path(path), meta)


def load_scores(path: str | Path, model_config: ModelConfig | None = None) -> HeadScores:
    """Reads a score file, ours or a published one; keys may come in any order.

    Args:
        path: .json or .json.gz; the meta companion beside it is read where there is one.
        model_config: the model that the scores are for; its shape is checked.

    Raises:
        ValueError: no such file, not the format, or scores of a model of another shape.
    """
    path = local_path(path, "the score file")
    if not path.is_file():
        raise ValueError(f"no head score file at {path}")
    scores = HeadScores(_samples(path, _read_json(path)), _read_meta(path))
    if model_config is not None:
        check_shape(scores, model_config, str(path))
    return scores


def default_scores(config: ModelConfig) -> HeadScores | None:
    """Head scores that lie beside the model's weights, if any."""
    path = Path(config.source) / "head_scores.json"
    return load_scores(path, config) if config.source and path.is_file() else None


def check_shape(scores: HeadScores, model_config: ModelConfig, name: str = "head scores") -> None:
    """Raises ValueError where the scores are not of a model of this shape."""
    got, expected = scores.samples.shape[:2], (model_config.num_layers, model_config.query_heads)
    if got != expected:
        raise ValueError(
            f"{name}: scores of {got[0]} layers x {got[1]} heads, "
            f"expected {expected[0]} layers x {expected[1]} heads as the model has"
        )


def meta_path(path: str | Path) -> Path:
    """heads.json or heads.json.gz -> heads.meta.json."""
    path = Path(path)
    stem = path.name.removesuffix(".gz").removesuffix(".json")
    return path.with_name(f"{stem}.meta.json")


def _samples(path: Path, table: Any) -> np.ndarray:
    if not isinstance(table, dict) or not table:
        raise ValueError(f"{path}: expected one JSON object 'layer-head' -> list of floats")
    bad = next((key for key in table if not _is_key(key)), None)
    if bad is not None:
        raise ValueError(f"{path}: key {bad!r}, expected 'layer-head' such as '0-12'")
    problems = [f"{key} {found}" for key in table if (found := _problem(table[key]))]
    if problems:
        more = f"; and {len(problems) - MOST_NAMED} heads more" * (len(problems) > MOST_NAMED)
        raise ValueError(
            f"{path}: head {'; '.join(problems[:MOST_NAMED])}{more}; expected a list of finite "
            "numbers of at least 0"
        )
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


def _problem(values: Any) -> str:
    """What is wrong with the samples of one head; empty for nothing."""
    if not isinstance(values, list):
        return f"has {type(values).__name__} {str(values)[:40]!r}"
    if not values:
        return "has an empty list"
    kinds = (int, float)  # not bool, which is an int too
    bad = [x for x in values if type(x) not in kinds or not 0 <= x <= sys.float_info.max]
    return f"has {str(bad[0])[:40]!r} in its list" if bad else ""


def _is_key(key: str) -> bool:
    layer, _, head = key.partition("-")
    return all(part.isascii() and part.isdigit() for part in (layer, head))


def _read_meta(path: Path) -> dict[str, Any]:
    companion = meta_path(path)
    meta = _read_json(companion) if companion.is_file() else {}
    if not isinstance(meta, dict):
        raise ValueError(f"{companion}: got {type(meta).__name__}, expected a JSON object")
    return meta


def _read_json(path: Path) -> Any:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            return json.load(file)
    except (ValueError, RecursionError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from None


def _write_json(path: Path, value: Any) -> None:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        json.dump(value, file)


def split_half(scores: HeadScores, splits: int = 20) -> float:
    """Spearman correlation of the heads' means over two random halves, the mean of some splits.

    Returns:
        at most 1; NaN for fewer than two samples, or where all heads are equal.
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
    """Rank correlation; equal values share their mean rank. NaN where all of one are equal."""
    x, y = (_ranks(values) for values in (a, b))
    if x.std() == 0 or y.std() == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(sizes)
    return (ends - (sizes - 1) / 2)[group.reshape(-1)]
