"""Head importance and head budgets: what a model's scores say, and what policies kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eval.report import page
from eval.report.pictures import Pictures
from eval.report.runs import Run

SCORES = "head_scores.json"


def importance(
    runs: Sequence[Run], files: Sequence[Path], kv_size: int, pictures: Pictures
) -> list[str]:
    """Importance of the query heads, and the KV heads' budgets at one size.

    Args:
        files: score files; those that lie beside the runs' models are added. Nothing is
            downloaded for it.

    Raises:
        ValueError: a file that is no score file.
    """
    from kvjax.headkv import allocate, load_scores

    parts = []
    for name, path, heads in [*((f.name, f, None) for f in files), *_models(runs)]:
        scores = load_scores(path)
        layers, count = scores.mean.shape
        axis = ("layer", range(layers))
        file = pictures.heat(
            f"importance {name}",
            scores.mean,
            f"{name}: importance",
            axis,
            ("query head", range(count)),
        )
        best = np.unravel_index(np.argmax(scores.mean), scores.mean.shape)
        alt = f"Importance of {count} query heads in {layers} layers, highest in layer {best[0]}"
        parts += [page.heading(name), page.figure(file, alt)]
        kind = "query_head" if heads is None else "kv_head"
        caps = allocate(scores, kv_size=kv_size, num_kv_heads=heads or count, granularity=kind)
        label = kind.replace("_", " ").replace("kv", "KV")
        title = f"{name}: tokens besides the window, KV size {kv_size}, β 1.2"
        file = pictures.heat(f"budgets {name}", caps, title, axis, (label, range(caps.shape[1])))
        alt = f"Budgets of the heads, {caps.min()} to {caps.max()} tokens at a mean of {kv_size}"
        parts.append(page.figure(file, alt))
    return [page.section("Head importance", *parts)] if parts else []


def kept(runs: Sequence[Run], pictures: Pictures) -> list[str]:
    """Tokens of the prompt that each head kept, where heads differ."""
    parts, seen = [], set()
    for run in runs:
        for entry in run.policies:
            tables = entry.get("kept") or {}
            model = run.results.get("model", "")
            if not tables:
                continue
            bucket = max(tables, key=int)
            key = (model, entry["policy"], bucket)
            if key in seen or len({len(row) for row in tables[bucket]}) != 1:
                continue  # a picture needs as many heads in every layer
            values = np.asarray(tables[bucket])
            if not values.size or values.min() == values.max():
                continue
            seen.add(key)
            title = f"{entry['policy']}, prompts of up to {bucket} tokens"
            file = pictures.heat(
                f"kept {entry['policy']}",
                values,
                title,
                ("layer", range(values.shape[0])),
                ("KV head", range(values.shape[1])),
            )
            alt = f"Tokens kept by each KV head under {title}: {values.min()} to {values.max()}"
            parts.append(page.figure(file, alt, f"{model}: {title}"))
    return [page.section("Tokens kept per head", *parts)] if parts else []


def _models(runs: Sequence[Run]) -> list[tuple[str, Path, int | None]]:
    """Models of the runs that have a score file beside them: name, file and KV heads."""

    from kvjax.hf import read_model
    from kvjax.hf.source import BUILTIN, resolve

    found = []
    for name in dict.fromkeys(str(run.results.get("model", "")) for run in runs):
        if not name or not (name.startswith(BUILTIN) or Path(name).is_dir()):
            continue
        try:
            path = resolve(name) / SCORES
        except ValueError:
            continue
        if path.is_file():
            layer = read_model(name).config.layers[0]
            found.append((name, path, layer.attention.cached_heads))
    return found
