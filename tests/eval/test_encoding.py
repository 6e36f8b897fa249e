"""Prompts as ids: both protocols, cut as the task says, and the ids that end an answer."""

import dataclasses

import eval_toys as toys
import pytest
from tokenizer_toys import sentencepiece

from eval import likelihood
from eval.prompts import encode
from eval.task import Item, Task, TaskOptions
from eval.tasks import ruler
from kvjax.chat import end_ids
from kvjax.text import added_text

WORDS = toys.VOCAB.tokens[10:110]


def one(prompt, truncate="middle", new=8, meta=None, **rest):
    item = Item("one", prompt, ("x",), new, meta=meta or {})
    return Task("toy", (item,), toys.checksum, "checksum", truncate=truncate, **rest)


def ids_of(task, chat=False, max_length=None):
    loaded = toys.loaded(chat=True)
    [prompt] = encode(task, loaded.tokenizer, loaded.model.config, chat, max_length)
    return list(prompt.ids), prompt


def text(count):
    return " ".join(WORDS[:count])


def encoded(words):
    return toys.VOCAB.encode(words)


def test_a_prompt_that_fits_is_as_it_was():
    got, prompt = ids_of(one(text(30)))
    assert got == [1, *encoded(text(30))] and not prompt.truncated
    got, _ = ids_of(one(tuple(range(5, 40))))
    assert got == list(range(5, 40))


def test_the_middle_is_left_out():
    got, prompt = ids_of(one(text(100)), max_length=41)
    whole = [1, *encoded(text(100))]
    assert got == whole[:16] + whole[-17:]
    assert prompt.truncated and prompt.length == 101


def test_the_left_is_left_out_but_for_the_first_token():
    got, _ = ids_of(one(text(100), "left"), max_length=40)
    assert got == [1, *encoded(text(100))[-31:]]
    got, _ = ids_of(one(tuple(range(5, 105)), "left"), max_length=40)
    assert got == list(range(73, 105))


def test_the_model_s_context_is_the_most():
    got, prompt = ids_of(one(tuple(range(5, 305)), new=20))
    assert len(got) == toys.CONTEXT - 20 and prompt.length == 300


def test_a_task_may_refuse():
    refused = "item one has 101 tokens, expected at most 32: .* --lengths asks for shorter prompts"
    with pytest.raises(ValueError, match=refused):
        ids_of(one(text(100), "refuse"), max_length=40)
    with pytest.raises(ValueError, match="expected room for a prompt"):
        ids_of(one(text(3)), max_length=9)
    with pytest.raises(ValueError, match="empty prompt"):
        ids_of(one(()))


def test_the_chat_template_stays_whole():
    start, end = toys.loaded(True).tokenizer.encode("<bos> user :", add_special_tokens=False), None
    end = toys.loaded(True).tokenizer.encode("<eos> answer :", add_special_tokens=False)
    got, prompt = ids_of(one(text(20)), chat=True)
    assert got == [*start, *encoded(text(20)), *end] and not prompt.truncated
    got, prompt = ids_of(one(text(100)), chat=True, max_length=48)
    inner, room = encoded(text(100)), 40 - len(start) - len(end)
    head = room // 2
    assert got == [*start, *inner[:head], *inner[head - room :], *end]
    assert prompt.truncated and prompt.length == 100 + len(start) + len(end)


def test_who_gets_the_chat_template():
    plain, _ = ids_of(one(text(20)))
    for task in (one(text(20), chat=False), one(text(20), meta={"chat": False})):
        assert ids_of(task, chat=True)[0] == plain
    assert ids_of(one((5, 6, 7)))[0] == [5, 6, 7]
    within = one((5, 6, 7), meta={"chat": True})
    assert ids_of(within, chat=True)[0] == [5, 6, 7]
    with pytest.raises(ValueError, match="token ids outside the chat template"):
        ids_of(one((5, 6, 7)), chat=True)
    with pytest.raises(ValueError, match="token ids inside the chat template"):
        ids_of(within)
    loaded = toys.loaded()
    with pytest.raises(ValueError, match="no chat template"):
        encode(one(text(3)), loaded.tokenizer, loaded.model.config, True)


def test_everything_that_ends_an_answer():
    tokenizer = toys.loaded(chat=True).tokenizer
    config = dataclasses.replace(toys.config(), eos_ids=(7, 8))
    assert end_ids(tokenizer, config, False) == (7, 8, 2)
    other = toys.to_transformers(toys.VOCAB, toys.CONTEXT)
    other.chat_template = toys.TEMPLATE.replace("<eos>", "<pad>")
    assert end_ids(other, config, True) == (7, 8, 2, 0)


@pytest.mark.parametrize("text", ["the return", "<s>the return"])
def test_a_raw_prompt_begins_with_bos_once_and_does_not_end(text):
    task, tokenizer = one(text), sentencepiece(end=True)
    [prompt] = encode(task, tokenizer, toys.config(), chat=False)
    expected = sentencepiece().encode(text, add_special_tokens=not text.startswith("<s>"))
    assert (
        list(prompt.ids) == expected and expected.count(1) == 1 and prompt.length == len(expected)
    )


@pytest.mark.parametrize("scheme", ["first", "always", "never", "normalizer"])
def test_a_right_answer_follows_one_space(scheme):
    tokenizer = sentencepiece(scheme)
    item = dataclasses.replace(one("so").items[0], references=("the",))
    loaded = dataclasses.replace(toys.loaded(), tokenizer=tokenizer)
    task = dataclasses.replace(one("so"), items=(item,))
    [prompt] = encode(task, tokenizer, toys.config(), chat=False)
    example = likelihood._example(loaded.tokenizer, task, prompt)
    assert tokenizer.convert_ids_to_tokens(example.answer) == ["▁th", "e"]
    assert added_text(tokenizer, prompt.ids, example.answer) == " the"


@pytest.mark.parametrize("scheme", ["first", "always", "never", "normalizer"])
def test_pieces_of_a_long_prompt_meet_as_they_are_written(scheme, tmp_path):
    tokenizer = sentencepiece(scheme)
    (tmp_path / "essay.txt").write_text("The whale swims far. " * 500)
    options = TaskOptions(
        tokenizer=tokenizer,
        lengths=(2001,),  # the haystack is cut after a letter
        count=1,
        subsets=("niah_single_2",),
        settings={"haystack": str(tmp_path / "essay.txt")},
    )
    [item] = ruler.load(options).items
    text = tokenizer.decode(item.prompt, skip_special_tokens=True)
    assert "  " not in text and " \nWhat" not in text
    assert ". The whale swims far. The" in text and text.count("\nWhat is the special") == 1
