"""The files that belong to a model beside its weights."""

from __future__ import annotations

import shutil
from pathlib import Path

COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "KVJAX_NOTICE*",
    "USE_POLICY*",
    "head_scores*",
)


def copy_companions(source: Path, out: Path) -> None:
    """Copies tokenizer, chat templates, generation defaults, licence and head scores to `out`."""
    for pattern in COMPANIONS:
        for path in source.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, out / path.name, dirs_exist_ok=True)
            else:
                shutil.copy(path, out)
