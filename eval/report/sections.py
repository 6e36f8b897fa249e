"""The parts of the page, made from the runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.report import page
from eval.report.page import Pictures
from eval.report.runs import Run, cells

MOST_GROUPS = 60
FULL = "full"


def overview(runs: Sequence[Run]) -> str:
    """A table with one line for each run."""
    rows = [
        [
            run.name,
            run.results.get("task", "training"),
            run.results.get("model"),
            run.results.get("items"),
            run.results.get("protocol"),
            run.results.get("device"),
            run.results.get("date"),
        ]
        for run in runs
    ]
    header = ("run", "task", "model", "items", "protocol", "device", "date")
    return page.section("Runs", page.table(header, rows))


def results(runs: Sequence[Run], pictures: Pictures) -> list[str]:
    """Tables and needle grids of every run with scores."""
    found = []
    for run in runs:
        if run.kind == "scores":
            parts = [_policies(run), *_grids(run, pictures), *_groups(run), *_summaries(run)]
            found.append(page.section(f"{run.name}: {run.title}", *parts))
    return found


def against_bytes(runs: Sequence[Run], pictures: Pictures) -> list[str]:
    """Score against the bytes that the cache holds: a picture for each task and model."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        name, model = str(run.results.get("task")), str(run.results.get("model"))
        key = (name, model, str(run.results.get("metric")), str(run.results.get("protocol")))
        groups[key] += [entry for entry in run.policies if entry.get("cache_bytes")]
    parts = []
    for (task, model, metric, _), entries in groups.items():
        curves: dict[str, list[tuple[float, float, float | None]]] = defaultdict(list)
        level = None
        for entry in entries:
            kib, part = entry["cache_bytes"] / 1024, entry["all"]
            if entry["policy"] == FULL:
                level = (f"full, {page.size(entry['cache_bytes'])}", part["score"])
            else:
                # One line for each kind of policy, over its KV sizes.
                family = entry["policy"].partition(":")[0]
                curves[family].append((kib, part["score"], part["standard_error"]))
        if not curves:
            continue
        file = pictures.lines(
            f"bytes {task} {model}",
            curves,
            ("cache of a sequence, KiB", metric),
            f"{task}, {model}",
            log=(True, False),
            level=level,
        )
        alt = f"{metric} of {task} against cache bytes for {', '.join(curves)}"
        parts.append(page.figure(file, alt, "Bars are standard errors; bytes are those held."))
    return [page.section("Score against bytes", *parts)] if parts else []


def against_context(runs: Sequence[Run], pictures: Pictures) -> list[str]:
    """Memory and time against the prompt's length."""
    sections = []
    for run in runs:
        if run.kind != "latency":
            continue
        rows = run.results["rows"]
        parts = []
        # One picture for each number, with a line for each policy and batch.
        wanted = (
            ("cache_bytes", "cache", "MiB", 2.0**-20),
            ("time_to_first_token", "time to the first token", "ms", 1e3),
            ("time_per_token", "time per token", "ms", 1e3),
        )
        for key, what, unit, factor in wanted:
            curves: dict[str, list[tuple[float, float, float | None]]] = defaultdict(list)
            for row in rows:
                if row.get(key) is not None:
                    label = f"{row['policy']}, batch {row['batch']}"
                    curves[label].append((row["context"], row[key] * factor, None))
            if curves:
                names = ("context, tokens", f"{what}, {unit}")
                file = pictures.lines(
                    f"{run.name} {key}", curves, names, f"{what}: {run.results.get('model', '')}"
                )
                alt = f"{what} against context for {', '.join(curves)}"
                parts.append(page.figure(file, alt))
        header = (
            *("policy", "context", "batch", "first token, ms", "per token, ms"),
            *("cache", "full cache", "device peak"),
        )
        table = page.table(
            header,
            [
                [
                    *(row["policy"], row["context"], row["batch"]),
                    *(_ms(row.get(k)) for k in ("time_to_first_token", "time_per_token")),
                    page.size(row["cache_bytes"]),
                    page.size(row.get("full_cache_bytes")),
                    page.size(row.get("device_peak_bytes")),
                ]
                for row in rows
            ],
            "medians",
        )
        sections.append(page.section(f"{run.name}: memory and latency", *parts, table))
    return sections


def training(runs: Sequence[Run], pictures: Pictures) -> list[str]:
    """Loss curves of all training runs, in one picture."""
    logs = {run.name: run.log for run in runs if run.kind == "training"}
    if not logs:
        return []
    curves = {
        name: [(line["step"], line["loss"], None) for line in lines] for name, lines in logs.items()
    }
    file = pictures.lines("loss", curves, ("step", "loss"), "Training loss", markers=False)
    alt = f"Training loss against step for {', '.join(curves)}"
    rows = [
        [
            name,
            lines[-1]["step"],
            page.number(lines[0]["loss"]),
            page.number(lines[-1]["loss"]),
            page.number(min(line["loss"] for line in lines)),
            lines[-1].get("learning_rate"),
        ]
        for name, lines in logs.items()
    ]
    header = ("run", "steps", "first loss", "last loss", "least loss", "last learning rate")
    return [page.section("Training", page.figure(file, alt), page.table(header, rows))]


def provenance(runs: Sequence[Run]) -> str:
    """The command, device, versions and commit of every run."""
    parts = []
    for run in runs:
        r = run.results
        versions = r.get("versions") or {}
        parts += [
            page.heading(run.name),
            page.code(r["command"])
            if r.get("command")
            else page.paragraph("No command on record."),
            page.facts(
                [
                    ("device", r.get("device")),
                    ("dtype", r.get("dtype")),
                    ("seed", r.get("seed")),
                    ("date", r.get("date")),
                    ("seconds", r.get("seconds")),
                    ("commit", r.get("commit")),
                    ("versions", ", ".join(f"{name} {v}" for name, v in versions.items())),
                ]
            ),
        ]
    return page.section("How each run was made", *parts)


def _policies(run: Run) -> str:
    metric = run.results.get("metric", "score")
    rows = []
    for entry in run.policies:
        held, full, gqa = (entry.get(f"{n}cache_bytes") for n in ("", "full_", "gqa_"))
        rows.append(
            [
                entry["policy"],
                page.with_error(entry["all"]),
                entry["all"].get("items"),
                page.size(held),
                f"{held / full:.1%}" if held and full else None,
                f"{held / gqa:.1%}" if held and gqa else None,
                entry.get("truncated"),
            ]
        )
    header = ("policy", f"{metric} ± s.e.", "items", "cache", "of full", "of GQA", "prompts cut")
    return page.table(header, rows)


def _grids(run: Run, pictures: Pictures) -> list[str]:
    """A picture of depth against length for each policy, for runs with such groups."""
    parts = []
    for entry in run.policies:
        found = cells(entry.get("groups", {}))
        if found is None:
            continue
        lengths, depths = (sorted({key[axis] for key in found}) for axis in (0, 1))
        # Cells without a score stay blank.
        values = np.full((len(depths), len(lengths)), np.nan)
        for (length, depth), part in found.items():
            values[depths.index(depth), lengths.index(length)] = part["score"]
        title = f"{run.results.get('task')}: {entry['policy']}"
        file = pictures.heat(
            f"{run.name} {entry['policy']}",
            values,
            title,
            ("depth", [f"{depth:.2f}" for depth in depths]),
            ("prompt tokens", lengths),
            (0.0, 1.0),
        )
        mean = page.number(float(np.nanmean(values)))
        alt = f"{title}: score at {len(depths)} depths and {len(lengths)} lengths, mean {mean}"
        parts.append(page.figure(file, alt, f"{entry['policy']}: mean of the cells {mean}"))
    return parts


def _groups(run: Run) -> list[str]:
    names = list(dict.fromkeys(g for entry in run.policies for g in entry.get("groups", {})))
    if not names or len(names) > MOST_GROUPS or cells(dict.fromkeys(names)) is not None:
        return []
    rows = []
    for name in names:
        parts = [entry.get("groups", {}).get(name) for entry in run.policies]
        rows.append([name, *(None if part is None else page.with_error(part) for part in parts)])
    header = ("group", *(entry["policy"] for entry in run.policies))
    return [page.table(header, rows, "by group")]


def _summaries(run: Run) -> list[str]:
    """The further numbers of the task, for each policy."""
    parts = []
    for entry in run.policies:
        pairs = [
            (name, page.number(value) if isinstance(value, float) else value)
            for name, value in (entry.get("summary") or {}).items()
        ]
        if pairs:
            parts += [page.heading(entry["policy"]), page.facts(pairs)]
    return parts


def _ms(seconds: float | None) -> str | None:
    return None if seconds is None else page.number(1e3 * seconds, 2)


SCORES = "head_scores.json"


def importance(
    runs: Sequence[Run], files: Sequence[Path], kv_size: int, pictures: Pictures
) -> list[str]:
    """Importance of the query heads, and the KV heads' budgets at one size.

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
        title = f"{name}: tokens besides the recent ones, KV size {kv_size}, β 1.2"
        file = pictures.heat(f"budgets {name}", caps, title, axis, (label, range(caps.shape[1])))
        alt = f"Budgets of the heads, {caps.min()} to {caps.max()} tokens at a mean of {kv_size}"
        parts.append(page.figure(file, alt))
    return [page.section("Head importance", *parts)] if parts else []


def kept(runs: Sequence[Run], pictures: Pictures) -> list[str]:
    """Tokens of the prompt that each head kept, for policies whose heads differ."""
    parts, seen = [], set()
    for run in runs:
        for entry in run.policies:
            tables = entry.get("kept") or {}
            model = run.results.get("model", "")
            if not tables:
                continue
            bucket = max(tables, key=int)
            key = (model, entry["policy"], bucket)
            # Runs of one model repeat the same table; one picture of it is enough.
            if key in seen or len({len(row) for row in tables[bucket]}) != 1:
                continue  # a picture needs the same number of heads in every layer
            values = np.asarray(tables[bucket])
            # A picture of equal heads shows nothing.
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
