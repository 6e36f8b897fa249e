"""The part of the page about a run with scores: what it shows, a picture, grids and tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from eval.report import page
from eval.report.headline import FULL, headline, share, share_of_full
from eval.report.pictures import Pictures
from eval.report.runs import Run, cells

MOST_GROUPS = 60


def results(runs: Sequence[Run], pictures: Pictures) -> list[str]:
    """A section for every run with scores."""
    found = []
    for run in runs:
        if run.kind == "scores":
            said = headline(run)
            parts = [
                *([] if said is None else [page.lead(said)]),
                *_against_bytes(run, pictures),
                *_grids(run, pictures),
                _policies(run),
                *_groups(run),
                *_summaries(run),
            ]
            found.append(page.section(run.title, *parts))
    return found


def _against_bytes(run: Run, pictures: Pictures) -> list[str]:
    """A picture of the score against the share of the full cache, a line for each policy."""
    curves: dict[str, list[tuple[float, float, float | None]]] = defaultdict(list)
    level, metric = None, _words(run.results.get("metric") or "score")
    for entry in run.policies:
        held, part = share_of_full(entry), entry["all"]
        if entry["policy"] == FULL:
            level = (f"full cache, {page.size(entry.get('cache_bytes'))}", part["score"])
        elif held:
            # One line for each kind of policy, over its sizes.
            family = entry["policy"].partition(":")[0]
            curves[family].append((100 * held, part["score"], part.get("standard_error")))
    if not curves:
        return []
    names = ("cache, share of the full cache's bytes", metric)
    file = pictures.lines(
        f"{run.name} bytes", curves, names, log=(True, False), level=level, percent=True
    )
    alt = f"{run.title}: {metric} against the share of the full cache's bytes for "
    return [page.figure(file, alt + ", ".join(curves), "Bars are standard errors.")]


def _policies(run: Run) -> str:
    metric = _words(run.results.get("metric") or "score")
    rows = []
    for entry in run.policies:
        held, of_full = entry.get("cache_bytes"), share_of_full(entry)
        of_gqa = share_of_full(entry, "gqa_cache_bytes")
        rows.append(
            [
                entry["policy"],
                page.with_error(entry["all"]),
                entry["all"].get("items"),
                page.size(held),
                None if of_full is None else share(of_full),
                None if of_gqa is None else share(of_gqa),
                entry.get("truncated"),
            ]
        )
    header = ("policy", f"{metric} ± s.e.", "items", "cache", "of full", "of GQA", "prompts cut")
    return page.table(header, rows)


def _grids(run: Run, pictures: Pictures) -> list[str]:
    """Maps of depth against length, one for each policy, for runs with such groups."""
    maps, means = {}, []
    lengths, depths = [], []
    for entry in run.policies:
        found = cells(entry.get("groups", {}))
        if found is None:
            continue
        lengths, depths = (sorted({key[axis] for key in found}) for axis in (0, 1))
        # Cells without a score stay blank.
        values = np.full((len(depths), len(lengths)), np.nan)
        for (length, depth), part in found.items():
            values[depths.index(depth), lengths.index(length)] = part["score"]
        maps[entry["policy"]] = values
        means.append(f"{entry['policy']} {page.number(float(np.nanmean(values)))}")
    if not maps or len({each.shape for each in maps.values()}) > 1:
        return []
    rows = ("depth of the needle", [f"{depth:.2f}" for depth in depths])
    metric = _words(run.results.get("metric") or "score")
    columns = ("prompt, tokens", lengths)
    file = pictures.maps(f"{run.name} grid", maps, rows, columns, (0.0, 1.0), metric)
    alt = f"{run.title}: {metric} at {len(depths)} depths and {len(lengths)} lengths; means: "
    return [page.figure(file, alt + ", ".join(means), f"Means: {', '.join(means)}")]


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


def _words(name: str) -> str:
    """A name of the code as words."""
    return name.replace("_", " ")
