"""A tiny random model with the project's tokenizer, and a task whose scores are a checksum."""

import functools
import json
import shutil
import zlib
from pathlib import Path

import numpy as np
from toys import random_params

import kvjax
from eval.run import LoadedModel
from eval.task import Item, Task
from kvjax.config import GQAConfig, LayerConfig, MLPConfig, ModelConfig, RopeConfig
from kvjax.nn import Transformer
from kvjax.policies.importance import HeadScores
from kvjax.tasks.words import WordVocabulary, to_transformers

VOCAB = WordVocabulary()
CONTEXT = 128
SCORES = HeadScores(np.random.default_rng(0).random((2, 4, 5)) ** 4)
TEMPLATE = (
    "{% for m in messages %}{{ '<bos> ' + m['role'] + ' : ' + m['content'] + ' <eos> ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'answer :' }}{% endif %}"
)


def config(**changes):
    layer = LayerConfig(GQAConfig(4, 2, 8, 8**-0.5, RopeConfig(8)), MLPConfig(32))
    settings = {"max_position_embeddings": CONTEXT, "bos_id": 1, "eos_ids": (2,), **changes}
    return ModelConfig("llama", VOCAB.size, 32, (layer, layer), **settings)


@functools.cache
def loaded(chat=False):
    model = Transformer(config())
    tokenizer = to_transformers(VOCAB, CONTEXT)
    if chat:
        tokenizer.chat_template = TEMPLATE
    return LoadedModel("toy", model, random_params(model), tokenizer)


def checkpoint(path: Path) -> Path:
    """A tiny llama in Hugging Face's layout, with a tokenizer and head scores."""
    from kvjax.hf import config_from_hf

    source = Path(kvjax.__file__).parent / "builtin" / "needle"
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "torch_dtype": "float32"}
    text = json.loads((source / "config.json").read_text()) | small
    model = Transformer(config_from_hf(text))
    kvjax.save(model, random_params(model), path, layout="hf")
    for file in source.glob("tokenizer*"):
        shutil.copy(file, path)
    SCORES.save(path / "head_scores.json")
    return path


def checksum(item, text):
    return zlib.crc32(f"{item.id} {text}".encode()) % 101 / 100


def task(count=11, score=checksum, lengths=(49, 64), **settings):
    """Random words; some items are ids, and two have the same prompt.

    All prompts have one bucket, of 64 tokens, unless other lengths are asked for.
    """
    rng = np.random.default_rng(1)
    items = []
    for index in range(count):
        size = int(rng.integers(*lengths))
        ids = rng.integers(4, VOCAB.size, size).tolist()
        prompt = VOCAB.decode(ids) if index % 3 else (1, *ids)
        items.append(Item(f"q{index}", prompt, ("x",), 4 + 2 * (index % 2), f"g{index % 2}"))
    twin = items[1]
    items.append(Item("twin", twin.prompt, ("x",), twin.max_new_tokens))
    return Task("toy", tuple(items), score, "checksum", **settings)
