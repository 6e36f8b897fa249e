"""Questions that come after a text was compressed: which policies still have the answers?

    python -m benchmarks.contexts [BOOK.txt.gz] [--model builtin:smollm2] [--out contexts.json]

The model reads the demo's page (four questions), or a piece of BOOK with two seven-digit numbers in
it (two questions), in the chat template; the policy compresses it; then each question is asked. A
text is read once for all policies. An answer is right if it has the expected words.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kvjax
from benchmarks.environment import environment
from kvjax.cache.room import trimmed
from kvjax.chat import document_ids
from kvjax.context import Context, reader_identity
from kvjax.paths import local_path
from kvjax.policies.importance import default_scores
from kvjax.policies.named import resolve
from kvjax.prefilling import bucket_length, compressions, pad, read_prompts
from kvjax.runs import write_json

PAGE = Path(kvjax.__file__).parent / "commands" / "demo" / "marrow_bay.txt"
QUESTIONS = (
    ("What is the number that opens the safe of the town hall?", "7405183"),
    ("What was the password of the watchmen?", "grey geese"),
    ("What is the name of the ship that broke on the rocks in 1836?", "Corvina"),
    ("What is the oldest paper in the town hall?", "rope"),
)
KEYS = ("amber", "velvet", "copper", "willow", "marble", "saffron", "indigo", "pepper")
NEEDLE = "One of the special magic numbers for {} is: {}"
QUESTION = "What is the special magic number for {} mentioned in the text?"
POLICIES = (
    "full",
    "full:entries=int8",
    "full:entries=int4",
    "headkv:ratio=0.5",
    "keydiff:ratio=0.5",
    "snapkv:ratio=0.5",
    "headkv:ratio=0.25",
    "keydiff:ratio=0.25",
    "expected:ratio=0.25",
)
CHARACTERS = 4200  # of a piece of the book, about 1000 tokens

Asked = tuple[str, str, list[tuple[str, str]]]
"""kind, text, and questions with what their answers must have."""


def texts(book: Path | None, count: int) -> Iterator[Asked]:
    """The page, and pieces of the book."""
    yield "page", PAGE.read_text(encoding="utf-8").split("\n# ")[0], list(QUESTIONS)
    if book is None:
        return
    with gzip.open(book, "rt", encoding="utf-8") as file:
        whole, rng = file.read(), random.Random(5)
    for number in range(count):
        sentences = whole[200_000 + 30_000 * number :][:CHARACTERS].split(". ")[1:]
        asked = []
        for key in (KEYS[2 * number % len(KEYS)], KEYS[(2 * number + 1) % len(KEYS)]):
            value = str(rng.randrange(10**6, 10**7))
            place = int((0.15 + 0.6 * rng.random()) * len(sentences))
            sentences.insert(place, NEEDLE.format(key, value))
            asked.append((QUESTION.format(key), value))
        yield "numbers", ". ".join(sentences), asked


def contexts(model: Any, params: Any, ids: list[int], policies: list[str]) -> Iterator[Context]:
    """The text's context under each policy, from one reading."""
    tokens, lengths = pad([ids], bucket_length(len(ids)))
    scores, reader = default_scores(model.config), reader_identity(model.config, params)
    resolved = [resolve(policy, model.config, scores) for policy in policies]
    works = compressions(model, params, lengths, resolved, max_new_tokens=0)
    for policy, cache in zip(policies, read_prompts(model, params, tokens, works)[1], strict=True):
        yield Context(trimmed(cache), len(ids), policy, reader, chat=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("book", type=local_path, nargs="?")
    parser.add_argument("--model", default="builtin:smollm2")
    parser.add_argument("--pieces", type=int, default=4, help="of the book")
    parser.add_argument("--policy", action="append", dest="policies", help="repeat for more")
    parser.add_argument("--out", type=local_path, default=Path("contexts.json"))
    args = parser.parse_args()
    policies: list[str] = args.policies or list(POLICIES)
    model, params = kvjax.load(args.model, dtype="float32")
    tokenizer: Any = kvjax.load_tokenizer(args.model)
    rows = {name: {"policy": name, "share": [], "page": [], "numbers": []} for name in policies}
    for kind, text, asked in texts(args.book, args.pieces):
        ids = document_ids(tokenizer, text)
        full = None
        for context in contexts(model, params, ids, policies):
            full = full or context.nbytes
            row = rows[context.policy]
            row["share"].append(round(context.nbytes / full, 4))
            questions = [question for question, _ in asked]
            out = kvjax.generate_text(model, params, tokenizer, questions, 24, context=context)
            pairs = zip(out.texts, asked, strict=True)
            right = [int(answer.lower() in said.lower()) for said, (_, answer) in pairs]
            row[kind] += right
            print(json.dumps({"kind": kind, "policy": context.policy, "right": right}), flush=True)
        about = {**environment("benchmarks.contexts"), "model": args.model}
        write_json(args.out, {**about, "rows": list(rows.values())})


if __name__ == "__main__":
    main()
