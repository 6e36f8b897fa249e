"""LooGLE: questions on documents of 2022 and later, near and far apart (arXiv 2311.04939).

Four files of DATA_DIR/loogle (.jsonl, also .gz or .xz), without --data-dir the hub dataset:

| subset | score |
|---|---|
| longdep_qa, of type timeline_reorder | exact order |
| longdep_qa, of the types comprehension, information retrieval | F1 |
| longdep_qa, of type computation | F1 of texts with plain numbers |
| shortdep_qa | F1 |
| shortdep_cloze | exact match: share of the masks |
| longdep_summarization | ROUGE-L |

Groups are the subsets, and "longdep_qa/TYPE".

The benchmark's automatic metrics are BLEU, ROUGE, METEOR and BERTScore; its main metric is a
judgement by GPT-4. Metrics that need models or word nets are left out. F1 is the score of questions
because it does not reward length. The summary adds ROUGE-L of the questions, the benchmark's
partial match of masks (a word in common), and the mean deviation of places in orders. Prompts are
this project's.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from eval import rows
from eval.metrics import exact_match, normalized, plain, qa_f1, rouge_l, whole_number
from eval.task import Item, Reads, Task, TaskOptions, check_options

HUB = "bigai-nlco/LooGLE"
MAX_NEW_TOKENS = {"longdep_qa": 500, "shortdep_qa": 300, "longdep_summarization": 500}
TOKENS_OF_MASK = 24
SUBSETS = ("longdep_qa", "shortdep_qa", "shortdep_cloze", "longdep_summarization")
TYPES = (
    "comprehension_and_reasoning",
    "multiple_information_retrieval",
    "computation",
    "timeline_reorder",
)
COMPUTATION = "longdep_qa/computation"
ASK = {
    "qa": "Answer the question below from the text above, briefly and without explanation.",
    "timeline_reorder": "Put the numbered events below in the order in which they happened, by the "
    "text above. Answer with their numbers alone, with commas between.",
    "shortdep_cloze": "In the passage below, names of the text above are replaced by masks; the "
    "same mask stands for the same name. Say what each stands for, one a line, like "
    "<mask-0>: name",
    "longdep_summarization": "Write a summary of the text above, of some hundred words.",
}


def reads(options: TaskOptions) -> Reads:
    """The options that LooGLE reads."""
    return Reads(("data_dir", "limit", "subsets"))


def load(options: TaskOptions) -> Task:
    """Questions of the subsets; `limit` counts documents.

    Raises:
        ValueError: an unknown subset, a missing file, or a corrupt row.
    """
    check_options("loogle", options, reads(options))
    unknown = [name for name in options.subsets if name not in SUBSETS]
    if unknown:
        raise ValueError(f"LooGLE has no {', '.join(unknown)}, expected some of {SUBSETS}")
    folder = None if options.data_dir is None else Path(options.data_dir) / "loogle"
    items: list[Item] = []
    for name in options.subsets or SUBSETS:
        for document, row in enumerate(_rows(name, folder, options.limit)):
            make = _summaries if name == "longdep_summarization" else _questions
            items += make(name, document, row)
    return Task("loogle", tuple(items), score, metric="loogle_score", summary=summary)


def score(item: Item, answer: str) -> float:
    """The score of the item's subset, see the module's table."""
    kind, reference = item.meta["kind"], item.references[0]
    if kind == "timeline_reorder":
        return float(_numbers(answer) == _numbers(reference))
    if kind == "shortdep_cloze":
        said = masks_of(answer)
        return float(
            np.mean([exact_match(said.get(m, ""), name) for m, name in item.meta["masks"].items()])
        )
    if item.group == COMPUTATION:
        answer, reference = plain(answer), plain(reference)
    return (rouge_l if kind == "longdep_summarization" else qa_f1)(answer, reference)


def summary(results: list[tuple[Item, str, float]]) -> dict[str, Any]:
    """The metric of each group, and further numbers of the benchmark for the groups that ran."""
    names = {"timeline_reorder": "exact_order", "shortdep_cloze": "exact_match", "qa": "qa_f1"}
    found: dict[str, list[float]] = {}
    for item, answer, _ in results:
        kind, reference = item.meta["kind"], item.references[0]
        if kind == "shortdep_cloze":
            found.setdefault("cloze_partial_match", []).append(_partial(item, answer))
        elif kind == "timeline_reorder":
            deviation = location_deviation(_numbers(answer), _numbers(reference))
            found.setdefault("location_mean_deviation", []).append(deviation)
        elif kind == "qa":
            found.setdefault("qa_rouge_l", []).append(rouge_l(answer, reference))
    return {
        "metrics": {item.group: names.get(item.meta["kind"], "rouge_l") for item, *_ in results},
        **{name: float(np.mean(values)) for name, values in found.items()},
    }


def masks_of(answer: str) -> dict[str, str]:
    """The name of each mask in an answer: a dictionary in braces, or lines as <mask-0>: name."""
    _, brace, rest = answer.partition("{")
    inside, end, _ = rest.partition("}")
    # Models answer in either form; literal_eval runs no code, but fails in many ways.
    with suppress(ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        held = ast.literal_eval(brace + inside + end)
        if isinstance(held, dict):
            return {str(key): str(value) for key, value in held.items()}
    lines = re.findall(r"<?mask-(\d+)>?\W*?[:=]\s*(.+)", answer)
    found: dict[str, str] = {}
    for number, name in lines:
        # The first name of a mask counts: a model may repeat itself.
        found.setdefault(f"<mask-{number}>", name)
    return found


def location_deviation(got: list[int], expected: list[int]) -> float:
    """LMD = Σ |place in got − place in expected| / n; a missing event counts as n places off."""
    n = len(expected)
    return float(
        np.mean([abs(got.index(e) - i) if e in got else n for i, e in enumerate(expected)])
    )


def _partial(item: Item, answer: str) -> float:
    said = masks_of(answer)
    pairs = [(said.get(mask, ""), name) for mask, name in item.meta["masks"].items()]
    shared = [set(normalized(a).split()) & set(normalized(b).split()) for a, b in pairs]
    return float(np.mean([bool(words) for words in shared]))


def _numbers(text: str) -> list[int]:
    """The numbers of the first line that has any."""
    lines = (re.findall(r"\d+", line) for line in text.split("\n"))
    return [whole_number(number) for number in next(filter(None, lines), [])]


def _rows(name: str, folder: Path | None, limit: int | None) -> list[rows.Row]:
    if folder is None:
        # The hub's files have a question a row, and this one's name is shorter there.
        config = "summarization" if name == "longdep_summarization" else name
        return rows.hub_rows(HUB, config, "test")[:limit]
    return rows.read_rows(rows.find(folder, name, (".jsonl",), of=f"LooGLE's {name}"), limit)


def _summaries(name: str, document: int, row: rows.Row) -> Iterator[Item]:
    prompt = f"{_start(row, name)}\n\nSummary:"
    references = (row.text("output", "answer"),)
    meta = {"kind": name}
    yield Item(f"{name}-{document}", prompt, references, MAX_NEW_TOKENS[name], name, meta)


def _questions(name: str, document: int, row: rows.Row) -> Iterator[Item]:
    for index, pair in enumerate(_pairs(row)):
        id, question, answer = f"{name}-{document}-{index}", pair["Q"], pair["A"]
        if name == "shortdep_cloze":
            yield _cloze(id, row, question, answer)
            continue
        kind, group = "qa", name
        if name == "longdep_qa":
            if pair.get("type") not in TYPES:
                raise ValueError(f"{row.where}: type {pair.get('type')!r}, expected of {TYPES}")
            kind = "timeline_reorder" if pair["type"] == "timeline_reorder" else "qa"
            group = f"{name}/{pair['type']}"
        prompt = f"{_start(row, kind)}\n\nQuestion: {question}\nAnswer:"
        yield Item(id, prompt, (str(answer),), MAX_NEW_TOKENS[name], group, {"kind": kind})


def _cloze(id: str, row: rows.Row, passage: str, answer: Any) -> Item:
    held = _literal(row, answer)
    if not isinstance(held, dict) or not held:
        raise ValueError(f"{row.where}: got answer {answer!r:.60}, expected masks and their names")
    masks = {str(mask): str(word) for mask, word in held.items()}
    return Item(
        id=id,
        prompt=f"{_start(row, 'shortdep_cloze')}\n\nPassage: {passage}\n\nAnswer:",
        references=("\n".join(f"{mask}: {word}" for mask, word in masks.items()),),
        max_new_tokens=TOKENS_OF_MASK * len(masks),
        group="shortdep_cloze",
        meta={"kind": "shortdep_cloze", "masks": masks},
    )


def _start(row: rows.Row, kind: str) -> str:
    return f"Text:\n{row.text('input', 'context').strip()}\n\n{ASK[kind]}"


def _pairs(row: rows.Row) -> list[dict[str, Any]]:
    """Questions of a row: a list as text in Python's syntax, or the row itself is a question."""
    if "qa_pairs" not in row.values:
        kind = row.values.get("task")
        return [{"Q": row.text("question"), "A": row.value("answer"), "type": kind}]
    pairs = _literal(row, row.value("qa_pairs"))
    if not isinstance(pairs, list) or not all(
        isinstance(pair, dict) and {"Q", "A"} <= set(pair) for pair in pairs
    ):
        raise ValueError(f"{row.where}: 'qa_pairs' holds no questions, expected Q and A of each")
    return pairs


def _literal(row: rows.Row, value: Any) -> Any:
    """The value of a text in Python's syntax; other values are returned unchanged."""
    try:
        return ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"{row.where}: {value!r:.60} is not a Python value ({error})") from None
