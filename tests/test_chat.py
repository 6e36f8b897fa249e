"""Messages of chats as token ids, and texts that end an answer."""

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_toys import CHAT, sentencepiece

from kvjax.chat import chat_ids, document_ids, turn_ids
from kvjax.text import StoppingStream, TextStream

MESSAGES = ["the x", "return\n in", "ab ?"]
ANSWERS = ["x", "the ab", "in"]


@functools.cache
def chatty():
    return sentencepiece(chat_template=CHAT)


def rendered(tokenizer, messages, answers, system=None):
    """Ids of a whole chat, in one piece."""
    turns = [] if system is None else [{"role": "system", "content": system}]
    for index, message in enumerate(messages):
        turns.append({"role": "user", "content": message})
        if index < len(answers):
            turns.append({"role": "assistant", "content": answers[index]})
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("system", [None, "so"])
def test_turns_together_are_the_whole_chat(system):
    tokenizer, ids = chatty(), []
    for number, message in enumerate(MESSAGES):
        turn = turn_ids(tokenizer, message, number, system=system)
        ids += turn.message + turn.opening
        text = tokenizer.decode(ids, skip_special_tokens=False)
        whole = rendered(tokenizer, MESSAGES[: number + 1], ANSWERS[:number], system)
        assert text == tokenizer.decode(whole, skip_special_tokens=False)
        assert number or ids == whole == chat_ids(tokenizer, message, system)
        ids += sentencepiece("never", start=False).encode(ANSWERS[number])


def test_a_question_ends_the_message_that_a_document_begins():
    tokenizer = chatty()
    head = document_ids(tokenizer, "the return x", system="so")
    turn = turn_ids(tokenizer, "in ?", document=True, system="so")
    whole = rendered(tokenizer, ["the return x\n\nin ?"], [], "so")
    assert head + turn.message + turn.opening == whole
    later = turn_ids(tokenizer, "ab", answered=1, document=True, system="so")
    assert later == turn_ids(tokenizer, "ab", answered=1)


@pytest.mark.parametrize("make", [document_ids, turn_ids])
def test_a_template_that_changes_the_message_is_refused(make):
    tokenizer = sentencepiece(chat_template="{{ messages[0].content | upper }}")
    with pytest.raises(ValueError, match="the chat template changes the user's message"):
        make(tokenizer, "the x")


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_an_answer_ends_before_the_stop_that_is_first_complete(text, stops):
    letters = {letter: chatty().convert_tokens_to_ids(letter) for letter in "ab"}
    stream, out = StoppingStream(TextStream(chatty(), chatty().encode("x")), stops), []
    for letter in text:
        out.append(stream.add([letters[letter]]))
        if stream.stopped:
            break
    said = "".join(out) + stream.end()
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    complete = text[: min(ends, default=0)]
    starts = [complete.find(stop) for stop in stops if stop in complete]
    assert said == text[: min(starts, default=len(text))]
