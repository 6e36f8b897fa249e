"""The word vocabulary, and its tokenizer."""

import pytest

from kvjax.tasks import WordVocabulary, words
from kvjax.tasks.prompt import PATTERNS, SLOTS

VOCAB = WordVocabulary()


def test_every_word_has_one_id_and_512_fill_the_table():
    assert len(set(words.ALL)) == len(words.ALL) == VOCAB.size == 512


def test_filler_words_are_never_part_of_an_answer():
    filler = {word for choices in SLOTS.values() for word in choices}
    filler |= {word for pattern in PATTERNS for word in pattern.split() if word not in SLOTS}
    assert not filler & {*words.THINGS, *words.NAMES, *words.AGES}
    assert filler <= set(words.ALL)


def test_encode_decode():
    text = "mary 's favorite thing is lantern violin ."
    assert VOCAB.decode(VOCAB.encode(text)) == text
    assert VOCAB.encode("mary zzz") == [VOCAB.encode("mary")[0], VOCAB.unknown_id]


def test_a_token_that_stands_twice_is_refused():
    with pytest.raises(ValueError, match="twice in the vocabulary: mary"):
        WordVocabulary((*words.SPECIAL, "mary", "mary"))


def test_special_tokens_come_first():
    with pytest.raises(ValueError, match="got first tokens"):
        WordVocabulary(("mary", *words.SPECIAL))


def test_tokenizer_agrees_with_the_vocabulary_on_plain_text():
    from kvjax.tasks.words import to_transformers

    tokenizer = to_transformers(VOCAB, 1280)
    text = "Mary's favorite thing is lantern violin. John is 12 years old, who is older?"
    spaced = "mary 's favorite thing is lantern violin . john is 12 years old , who is older ?"
    assert tokenizer(text)["input_ids"] == [VOCAB.bos_id, *VOCAB.encode(spaced)]
    assert len(tokenizer) == VOCAB.size
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (VOCAB.pad_id, VOCAB.eos_id)
