"""Ids of texts: BOS once, no EOS, no space that nobody wrote; and the ids that end an answer."""

import dataclasses

import eval_toys as toys
import pytest
from tokenizer_toys import CHAT, byte_level, sentencepiece, unigram, word_piece

from kvjax.chat import end_ids
from kvjax.text import added_text, ids_after, prompt_ids

SPACED = {
    "first": sentencepiece(),
    "always": sentencepiece("always"),
    "never": sentencepiece("never"),
    "normalizer": sentencepiece("normalizer"),
    "unigram": unigram(),
    "byte level": byte_level(),
}


@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("scheme", ["first", "always", "never", "normalizer"])
def test_a_prompt_begins_with_one_bos_and_does_not_end(scheme, end):
    plain, tokenizer = sentencepiece(scheme, start=False), sentencepiece(scheme, end=end)
    ids = prompt_ids(tokenizer, "the return")
    assert ids == [1, *plain.encode("the return")]
    assert tokenizer.encode("the return") == ids + [2] * end
    assert prompt_ids(tokenizer, "<s>the return") == plain.encode("<s>the return")
    assert prompt_ids(tokenizer, "<s>the return")[:2].count(1) == 1
    assert prompt_ids(tokenizer, "<s><s>x")[:3].count(1) == 2  # as it is written
    assert prompt_ids(tokenizer, "") == [1]
    assert prompt_ids(plain, "<s>x") == plain.encode("<s>x")
    assert prompt_ids(plain, "x") == plain.encode("x")


def test_a_chat_that_begins_with_bos():
    tokenizer = sentencepiece(chat_template=CHAT)
    turns = [{"role": "user", "content": "the return"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = prompt_ids(tokenizer, text)
    assert ids == tokenizer.encode(text, add_special_tokens=False) and ids.count(1) == 1


def test_tokenizers_that_begin_otherwise():
    assert prompt_ids(byte_level(), "ab") == byte_level().encode("ab")
    assert prompt_ids(word_piece(), "mary so") == word_piece().encode("mary so")
    words = toys.to_transformers(toys.VOCAB, toys.CONTEXT)
    assert prompt_ids(words, "mary sings") == [1, *toys.VOCAB.encode("mary sings")]
    assert prompt_ids(words, "<bos> mary sings") == [1, *toys.VOCAB.encode("mary sings")]


@pytest.mark.parametrize("name", SPACED)
@pytest.mark.parametrize(
    "text", ["the", " the", "  the", "    return x\n", "\n\nx", "\n", " ", "é", "☺", "n.", ""]
)
def test_a_text_after_another_is_as_it_is_written(name, text):
    tokenizer = SPACED[name]
    for before in ("so it is", "def f():\n", "<s>so", "ab."):
        for ids in (ids_after(tokenizer, text), ids_after(tokenizer, text, before)):
            assert added_text(tokenizer, tokenizer.encode(before), ids) == text


def test_no_spurious_space():
    for name in ("first", "always", "normalizer"):
        tokenizer = SPACED[name]
        tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode("\nx")[1:])
        assert tokens == ["▁", "<0x0A>", "x"]
        for text, expected in ((" the", ["▁th", "e"]), ("\nx", ["<0x0A>", "x"]), ("re", ["re"])):
            assert tokenizer.convert_ids_to_tokens(ids_after(tokenizer, text)) == expected


def test_byte_level_ids_are_those_of_the_text_alone():
    tokenizer = SPACED["byte level"]
    for text in (" the", "the", "\n  x", "</s> x", "é"):
        assert ids_after(tokenizer, text) == tokenizer.encode(text)


def test_after_special_tokens_the_tokenizer_s_own_way_holds():
    before, text = "<|assistant|>", "the<|end|>\n"
    for name in ("first", "normalizer"):
        tokenizer = SPACED[name]
        whole = tokenizer.encode(before + text, add_special_tokens=False)
        assert ids_after(tokenizer, text, before) == whole[1:]


def test_unknown_words_are_no_reason_to_lose_others():
    tokenizer = toys.to_transformers(toys.VOCAB, toys.CONTEXT)
    for text in ("mary sings", "zzz", "mary zzz ?", "a", "'s"):
        assert ids_after(tokenizer, text) == toys.VOCAB.encode(text.replace("'s", " 's"))


def test_everything_that_ends_an_answer():
    config = dataclasses.replace(toys.config(), eos_ids=(7, 8))
    tokenizer = sentencepiece(chat_template=CHAT)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert end_ids(tokenizer, config, chat=False) == (7, 8, 2)
    assert end_ids(tokenizer, config, chat=True) == (7, 8, 2, end)
    assert end_ids(sentencepiece(), config, chat=True) == (7, 8, 2)
    tokenizer.eos_token = None
    assert end_ids(tokenizer, config, chat=True) == (7, 8, end)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "{{ messages[5].content + 1 }}", "<s>nothing"]
)
def test_chat_templates_that_show_no_end_of_a_turn(template):
    tokenizer = sentencepiece(chat_template=template)
    assert end_ids(tokenizer, toys.config(), chat=True) == (2,)
