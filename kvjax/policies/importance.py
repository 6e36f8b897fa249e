"""Files of head importance: one number per head and sample, in the format of HeadKV's published
files."""

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
from kvjax.runs import write_whole

MOST_NAMED = 3
"""Number of heads that an error about a score file names."""


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
    scores = HeadScores(_samples(path, _read_json(path)), _read_meta(path))
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


def _problem(values: Any) -> str:
    """The first error in the samples of one head; empty if there is none."""
    if not isinstance(values, list):
        return f"has {type(values).__name__} {str(values)[:40]!r}"
    if not values:
        return "has an empty list"
    kinds = (int, float)  # excludes bool, a subclass of int
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
    # Not `kvjax.data_files.read_json`: whoever follows a token opens no file about rows of data.
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            return json.load(file)
    except (ValueError, RecursionError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from None


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
