"""LongBench: 21 tasks in English, Chinese and code (arXiv 2308.14508).

Prompts and output lengths are data of the benchmark and are read from its files
dataset2prompt.json and dataset2maxlen.json, in DATA_DIR/longbench or the folder of the setting
`config=FOLDER`. Rows come from DATA_DIR/longbench/NAME.jsonl (or .gz, .xz), without --data-dir
from the hub.

The six few-shot and completion tasks (trec, triviaqa, samsum, lsht, lcc, repobench-p) are never put
inside a chat template, as in the benchmark: their items have meta {"chat": false}.

Each item's score is the metric of its task against the reference that fits best. In the summary,
"metrics" names the metric of each task, and "macro_average" is the benchmark's total, the mean over
the tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval import metrics, rows
from eval.task import Item, Reads, Task, TaskOptions, check_options
from kvjax.fields import Count, Text, object_problems, refuse
from kvjax.text_files import read_object

HUB = "THUDM/LongBench"
PROMPTS, LENGTHS = "dataset2prompt.json", "dataset2maxlen.json"


@dataclass(frozen=True)
class Subset:
    """How one task is judged.

    Attributes:
        metric: a name of METRICS, or "classification".
        first_line: only the answer's first line counts, because few-shot prompts invite more. A
            stop cannot do this: the benchmark skips line ends before the answer.
        chat: whether the prompt may be inside a chat template.
    """

    metric: str
    first_line: bool = False
    chat: bool = True


METRICS: dict[str, Callable[[str, str], float]] = {
    "qa_f1": metrics.qa_f1,
    "qa_f1_zh": metrics.qa_f1_zh,
    "rouge_l": metrics.rouge_l,
    "rouge_zh": metrics.rouge_zh,
    "count": metrics.count,
    "retrieval": metrics.retrieval,
    "retrieval_zh": metrics.retrieval_zh,
    "code_similarity": metrics.code_similarity,
}

SUBSETS = {
    "narrativeqa": Subset("qa_f1"),
    "qasper": Subset("qa_f1"),
    "multifieldqa_en": Subset("qa_f1"),
    "multifieldqa_zh": Subset("qa_f1_zh"),
    "hotpotqa": Subset("qa_f1"),
    "2wikimqa": Subset("qa_f1"),
    "musique": Subset("qa_f1"),
    "dureader": Subset("rouge_zh"),
    "gov_report": Subset("rouge_l"),
    "qmsum": Subset("rouge_l"),
    "multi_news": Subset("rouge_l"),
    "vcsum": Subset("rouge_zh"),
    "trec": Subset("classification", first_line=True, chat=False),
    "triviaqa": Subset("qa_f1", first_line=True, chat=False),
    "samsum": Subset("rouge_l", first_line=True, chat=False),
    "lsht": Subset("classification", first_line=True, chat=False),
    "passage_count": Subset("count"),
    "passage_retrieval_en": Subset("retrieval"),
    "passage_retrieval_zh": Subset("retrieval_zh"),
    "lcc": Subset("code_similarity", chat=False),
    "repobench-p": Subset("code_similarity", chat=False),
}


def reads(options: TaskOptions) -> Reads:
    """The options and settings that LongBench reads."""
    return Reads(("data_dir", "limit", "subsets"), ("config",))


def load(options: TaskOptions) -> Task:
    """The named subsets; without names all subsets with a file, or all 21 from the hub.

    Raises:
        ValueError: an unknown subset, a missing file, or a row without what is needed.
    """
    check_options("longbench", options, reads(options))
    folder = None if options.data_dir is None else Path(options.data_dir) / "longbench"
    prompts, lengths = _config(folder, options.settings)
    items: list[Item] = []
    for name in _names(options.subsets, folder):
        data = _rows(name, folder, options.limit)
        items += [_item(name, index, row, prompts, lengths) for index, row in enumerate(data)]
    return Task(
        name="longbench",
        items=tuple(items),
        score=score,
        metric="longbench_score",
        raw="few-shot and code prompts are raw text in the benchmark, expected another --subsets",
        summary=summary,
    )


def score(item: Item, answer: str) -> float:
    """The best score over the references."""
    subset = SUBSETS[item.group]
    if subset.first_line:
        # Few-shot prompts end in a line end, so answers may begin with one.
        answer = answer.lstrip("\n").split("\n")[0]
    if subset.metric == "classification":
        classes = item.meta["classes"]
        return max(metrics.classification(answer, ref, classes) for ref in item.references)
    return max(METRICS[subset.metric](answer, ref) for ref in item.references)


def metric_name(subset: str) -> str:
    """Name of a subset's metric, see `eval.metrics.metric_name` for Chinese."""
    name = SUBSETS[subset].metric
    return metrics.metric_name(name) if name in ("qa_f1_zh", "rouge_zh") else name


def summary(results: list[tuple[Item, str, float]]) -> dict[str, Any]:
    """Each subset's metric, the mean over subsets, and a note where jieba is missing."""
    scores: dict[str, list[float]] = {}
    for item, _, value in results:
        scores.setdefault(item.group, []).append(value)
    judged_by = {name: metric_name(name) for name in scores}
    found: dict[str, Any] = {
        "metrics": judged_by,
        "macro_average": float(np.mean([np.mean(values) for values in scores.values()])),
    }
    if any(name.endswith("_chars") for name in judged_by.values()):
        found["note"] = metrics.MISSING
    return found


def _config(
    folder: Path | None, settings: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, int]]:
    place = Path(settings["config"]) if "config" in settings else folder
    if place is None:
        raise ValueError(
            f"LongBench's prompts are not part of this project: put {PROMPTS} and {LENGTHS} (from "
            "the folder config of the benchmark's repository) into a folder and give config=FOLDER"
        )
    for name in (PROMPTS, LENGTHS):
        if not (place / name).is_file():
            raise ValueError(
                f"no {place / name}: put {PROMPTS} and {LENGTHS} there, from the folder config of "
                "LongBench's repository"
            )
    found = []
    for name, kind in ((PROMPTS, Text), (LENGTHS, Count)):
        values = read_object(place / name)
        refuse(object_problems(values, dict.fromkeys(values, kind)), str(place / name))
        found.append(values)
    return found[0], found[1]


def _names(subsets: tuple[str, ...], folder: Path | None) -> list[str]:
    unknown = [name for name in subsets if name not in SUBSETS]
    if unknown:
        raise ValueError(
            f"LongBench has no {', '.join(unknown)}, expected some of {', '.join(SUBSETS)}"
        )
    if subsets or folder is None:
        return list(subsets or SUBSETS)
    found = [name for name in SUBSETS if rows.look(folder, name, (".jsonl",))]
    if not found:
        raise ValueError(
            f"no rows in {folder}: expected hotpotqa.jsonl and the like, a file for each task"
        )
    return found


def _rows(name: str, folder: Path | None, limit: int | None) -> list[rows.Row]:
    if folder is None:
        return rows.hub_archive(HUB, "data.zip", f"data/{name}.jsonl")[:limit]
    path = rows.find(folder, name, (".jsonl",), of=f"the rows of LongBench's {name}")
    return rows.read_rows(path, limit)


def _item(
    name: str, index: int, row: rows.Row, prompts: Mapping[str, str], lengths: Mapping[str, int]
) -> Item:
    if name not in prompts or name not in lengths:
        raise ValueError(f"{PROMPTS} and {LENGTHS} lack {name}, expected all of LongBench's tasks")
    references = row.texts("answers")
    try:
        prompt = prompts[name].format(context=row.text("context"), input=row.text("input"))
    # The prompts are the benchmark's files, which may ask for other columns.
    except (KeyError, IndexError) as error:
        raise ValueError(f"{PROMPTS}: the prompt of {name} wants {error}") from None
    subset = SUBSETS[name]
    meta: dict[str, Any] = {} if subset.chat else {"chat": False}
    if subset.metric == "classification":
        meta["classes"] = row.texts("all_classes")
    return Item(f"{name}-{index}", prompt, tuple(references), lengths[name], name, meta)
