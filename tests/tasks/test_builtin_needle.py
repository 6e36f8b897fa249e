"""The embedded model, from the files that the wheel ships, on prompts that it never saw."""

import jax
import pytest

import kvjax
from kvjax.tasks import WordVocabulary, accuracy, make_examples

VOCAB = WordVocabulary()
LENGTH = 370  # with an answer and its end no more than 384, a multiple of the padding


@pytest.fixture(scope="module")
def loaded():
    return kvjax.load("builtin:needle", dtype="float32")


def test_it_is_what_the_package_promises(loaded):
    config = loaded[0].config
    attention = config.layers[0].attention
    assert (attention.num_heads, attention.num_kv_heads, attention.head_dim) == (8, 4, 32)
    assert 4 <= config.num_layers <= 6 and config.max_position_embeddings >= 1280
    assert sum(leaf.size for leaf in jax.tree.leaves(loaded[1])) < 5_000_000
    assert config.eos_ids == (VOCAB.eos_id,) and config.vocab_size == VOCAB.size


def test_its_tokenizer_is_the_vocabulary():
    tokenizer = kvjax.load_tokenizer("builtin:needle")
    text = "question : what is the favorite thing of mary ? answer :"
    assert tokenizer(text)["input_ids"] == [VOCAB.bos_id, *VOCAB.encode(text)]
    assert tokenizer.eos_token_id == VOCAB.eos_id


@pytest.mark.parametrize(
    ("task", "at_least"), [("needle", 0.9), ("multi_key", 0.9), ("two_hop", 0.7)]
)
def test_recall_and_reasoning(loaded, task, at_least):
    examples = make_examples(task, VOCAB, 32, LENGTH, seed=1)
    assert accuracy(*loaded, examples, VOCAB.eos_id, batch_size=16) >= at_least
