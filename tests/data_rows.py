"""Rows, files and a chat template for the tests of train.data."""

import json

import kvjax
from train.data import DataConfig, SourceConfig

CHAT = (
    "{% for m in messages %}"
    "{% if m.role == 'user' %}question : {{ m.content }} "
    "{% elif m.role == 'assistant' %}answer : {{ m.content }} <eos> "
    "{% else %}{{ m.content }} . {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}answer : {% endif %}"
)


def word_tokenizer(chat_template=None):
    """The embedded model's tokenizer: one id a word, <bos> in front."""
    tokenizer = kvjax.load_tokenizer("builtin:needle")
    tokenizer.chat_template = chat_template
    return tokenizer


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def plain_rows(count, first=0):
    """Distinct rows: the question is two numbers, the answer one to four nouns."""
    nouns = ("lantern", "violin", "copper", "saddle")
    return [
        {
            "query": f"{10 + i % 60} {10 + i // 60}",
            "response": " ".join(nouns[: 1 + i % 4]),
        }
        for i in range(first, first + count)
    ]


def config(*paths, form="plain", weights=None, **options):
    """A small DataConfig."""
    weights = weights or [1.0] * len(paths)
    sources = tuple(
        SourceConfig(str(path), form, weight) for path, weight in zip(paths, weights, strict=True)
    )
    return DataConfig(sources, **{"sequence_length": 32, "batch_size": 4, "epochs": 1, **options})
