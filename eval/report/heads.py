"""Parts of the page about heads: their importance, and the tokens that each kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eval.report import page
from eval.report.pictures import Pictures
from eval.report.runs import Run

SCORES = "head_scores.json"


def importance(
    runs: Sequence[Run], files: Sequence[Path], kv_size: int | None, pictures: Pictures
) -> list[str]:
    """Importance of the query heads; with `kv_size` also the budgets of this size.

    Args:
        files: score files. The score files in the folders of the runs' models are added; nothing
            is downloaded.

    Raises:
        ValueError: a file that is not a score file.
    """
    from kvjax.headkv import allocate, load_scores

    parts = []
    for name, path, heads in [*((f.name, f, None) for f in files), *_models(runs)]:
        scores = load_scores(path)
        layers, count = scores.mean.shape
        rows = ("layer", range(layers))
        columns = ("query head", range(count))
        file = pictures.maps(f"importance {name}", {name: scores.mean}, rows, columns)
        best = np.unravel_index(np.argmax(scores.mean), scores.mean.shape)
        alt = f"Importance of {count} query heads in {layers} layers, highest in layer {best[0]}"
        parts += [page.heading(name), page.figure(file, alt)]
        if kv_size is None:
            continue
        kind = "query_head" if heads is None else "kv_head"
        caps = allocate(scores, kv_size=kv_size, num_kv_heads=heads or count, granularity=kind)
        columns = (kind.replace("_", " ").replace("kv", "KV"), range(caps.shape[1]))
        title = f"tokens besides the recent ones, KV size {kv_size}"
        file = pictures.maps(f"budgets {name}", {title: caps.astype(float)}, rows, columns)
        alt = f"Budgets of the heads, {caps.min()} to {caps.max()} tokens at a mean of {kv_size}"
        parts.append(page.figure(file, alt))
    return [page.section("Head importance", *parts)] if parts else []


def kept(runs: Sequence[Run], pictures: Pictures) -> list[str]:
    """Maps of the tokens that each head kept, for policies whose heads differ, by model."""
    parts = []
    found: dict[tuple[str, str, tuple[int, ...]], dict[str, np.ndarray]] = {}
    for run in runs:
        for entry in run.policies:
            tables = entry.get("kept") or {}
            bucket = max(tables, key=int, default=None)
            # A picture needs the same number of heads in every layer.
            if bucket is None or len({len(row) for row in tables[bucket]}) != 1:
                continue
            values = np.asarray(tables[bucket], float)
            # A picture of equal heads shows nothing.
            if values.size and values.min() < values.max():
                key = (str(run.results.get("model", "")), str(bucket), values.shape)
                found.setdefault(key, {})[entry["policy"]] = values
    for (model, bucket, shape), maps in found.items():
        rows, columns = ("layer", range(shape[0])), ("KV head", range(shape[1]))
        file = pictures.maps(f"kept {model}", maps, rows, columns, what="tokens kept")
        spans = [f"{title}: {v.min():.0f} to {v.max():.0f}" for title, v in maps.items()]
        what = f"{model}, prompts of up to {bucket} tokens"
        alt = f"{what}: tokens that each KV head keeps; {'; '.join(spans)}"
        parts.append(page.figure(file, alt, what))
    return [page.section("Tokens kept per head", *parts)] if parts else []


def _models(runs: Sequence[Run]) -> list[tuple[str, Path, int | None]]:
    """The runs' models that have a score file in their folder: name, file and KV heads."""
    from kvjax.hf import read_model
    from kvjax.hf.source import BUILTIN, resolve

    found = []
    for name in dict.fromkeys(str(run.results.get("model", "")) for run in runs):
        if not name or not (name.startswith(BUILTIN) or Path(name).exists()):
            continue
        try:
            place = resolve(name)
        except ValueError:
            continue
        path = (place if place.is_dir() else place.parent) / SCORES
        if path.is_file():
            layer = read_model(name).config.layers[0]
            found.append((name, path, layer.attention.cached_heads))
    return found
