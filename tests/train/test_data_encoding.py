"""Ids and learned tokens of rows, exactly."""

import numpy as np
import pytest
import tokenizer_toys
from data_rows import CHAT, word_tokenizer
from tokenizer_toys import sentencepiece
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvjax.text import added_text
from train.data.documents import Encoder


def words(tokenizer, document):
    """Every token, with a star where it is learned."""
    tokens = tokenizer.convert_ids_to_tokens(document.tokens.tolist())
    assert document.tokens.dtype == np.int32 and document.learned.dtype == np.bool_
    return " ".join(w + "*" * bool(x) for w, x in zip(tokens, document.learned, strict=True))


def test_an_answer_and_eos_are_learned():
    tokenizer = word_tokenizer()
    row = {"query": "who likes copper ?", "response": "mary ."}
    document = Encoder(tokenizer, "plain", "auto", "answers")(row)
    assert words(tokenizer, document) == "<bos> who likes copper ? mary* .* <eos>*"
    document = Encoder(tokenizer, "plain", "auto", "all")(row)
    assert words(tokenizer, document) == "<bos>* who* likes* copper* ?* mary* .* <eos>*"


def test_all_of_a_text_is_learned_but_what_has_nothing_before_it():
    tokenizer = word_tokenizer()
    document = Encoder(tokenizer, "text", "chat", "answers")({"text": "mary sings ."})
    assert words(tokenizer, document) == "<bos> mary* sings* .* <eos>*"


def test_the_prompt_is_what_generation_starts_from():
    tokenizer = word_tokenizer()
    row = {"question": "10 and 11 ?", "answer": "the answer is 21\n#### 21"}
    document = Encoder(tokenizer, "gsm8k", "auto", "answers")(row)
    prompt = (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\n10 and 11 ?\n\n### Response: "
        "Let's think step by step."
    )
    ids = tokenizer(prompt).input_ids
    assert document.tokens[: len(ids)].tolist() == ids
    assert not document.learned[: len(ids)].any() and document.learned[len(ids) :].all()
    assert words(tokenizer, document).endswith("the* answer* is* :* 21* <eos>*")


def chat(*turns):
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


ROW = chat(
    ("system", "mary is proud"),
    ("user", "who is proud ?"),
    ("assistant", "mary"),
    ("user", "who sings ?"),
    ("assistant", "anna sings"),
    ("user", "who rests ?"),
)


def test_every_turn_of_the_assistant_is_learned():
    tokenizer = word_tokenizer(CHAT)
    document = Encoder(tokenizer, "chat", "auto", "answers")(ROW)
    assert words(tokenizer, document) == (
        "mary is proud . question : who is proud ? answer : mary* <eos>* "
        "question : who sings ? answer : anna* sings* <eos>*"
    )
    rendered = tokenizer.apply_chat_template(ROW["messages"][:5], tokenize=False)
    assert document.tokens.tolist() == tokenizer(rendered, add_special_tokens=False).input_ids
    assert Encoder(tokenizer, "chat", "auto", "all")(ROW).learned.all()


def test_a_line_end_after_a_turn_is_not_learned():
    tokenizer = word_tokenizer(CHAT.replace("<eos> ", "<eos>{{ '\\n' }}"))
    tokenizer.add_tokens(["\n"])
    row = chat(("user", "who ?"), ("assistant", "mary"), ("user", "who ?"), ("assistant", "anna"))
    document = Encoder(tokenizer, "chat", "auto", "answers")(row)
    turn = "question : who ? answer : {}* <eos>* \n"
    assert words(tokenizer, document) == f"{turn.format('mary')} {turn.format('anna')}"


def test_a_special_token_within_an_answer_does_not_end_it():
    template = CHAT.replace(" <eos> ", " ")
    tokenizer = word_tokenizer(template)
    row = chat(("user", "who ?"), ("assistant", "mary <unk> anna"))
    document = Encoder(tokenizer, "chat", "auto", "answers")(row)
    assert words(tokenizer, document) == "question : who ? answer : mary* <unk>* anna*"


def test_questions_and_answers_in_the_chat_template():
    tokenizer = word_tokenizer(CHAT)
    row = {"query": "who is proud ?", "response": "mary"}
    document = Encoder(tokenizer, "metamath", "chat", "answers")(row)
    assert words(tokenizer, document) == "question : who is proud ? answer : mary* <eos>*"


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (None, ROW, "no chat template: take .* set tokenizer.chat_template"),
        ("{{ raise_exception('users first') }}", ROW, "refuses turns system, user: users first"),
        (
            CHAT.replace("question", "{{ messages | length }}"),
            ROW,
            "up to turn 3 .*'3 : who.*'2 : who",
        ),
        ("{{ messages[0].content + 1 }}", ROW, "the chat template refuses turns system, user"),
    ],
)
def test_chat_templates_that_do_not_serve(template, row, message):
    with pytest.raises(ValueError, match=message):
        Encoder(word_tokenizer(template), "chat", "auto", "answers")(row)


def test_an_assistant_that_speaks_first_answers_nothing():
    tokenizer = word_tokenizer(CHAT)
    greeting = ("assistant", "mary sings")
    row = chat(greeting, ("user", "who ?"), ("assistant", "anna"))
    document = Encoder(tokenizer, "chat", "auto", "answers")(row)
    assert words(tokenizer, document) == (
        "answer : mary sings <eos> question : who ? answer : anna* <eos>*"
    )
    with pytest.raises(ValueError, match="the assistant only speaks first"):
        Encoder(tokenizer, "chat", "auto", "answers")(chat(greeting))


def test_no_space_is_doubled_where_the_tokenizer_adds_one():
    """As sentencepiece does: any text that is encoded gets a space in front."""
    vocab = {token: i for i, token in enumerate(("<unk>", "<eos>", "▁", "▁a", "▁who", "▁mary"))}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>")
    assert tokenizer.tokenize(" mary") == ["▁", "▁mary"]
    row = {"query": "who", "response": "mary"}
    document = Encoder(tokenizer, "plain", "auto", "answers")(row)
    assert words(tokenizer, document) == "▁who ▁mary* <eos>*"


@pytest.mark.parametrize("scheme", ["first", "always", "never", "normalizer"])
@pytest.mark.parametrize("answer", ["the return", "x\n  re"])
def test_an_answer_gets_no_space_that_the_text_does_not_have(scheme, answer):
    tokenizer = sentencepiece(scheme, chat_template=tokenizer_toys.CHAT)
    row = {"query": "who", "response": answer}
    document = Encoder(tokenizer, "metamath", "auto", "answers")(row)
    prompt, new = (document.tokens[document.learned == part].tolist() for part in (0, 1))
    assert document.tokens.tolist() == [*prompt, *new] and new[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(prompt, skip_special_tokens=True)
    assert text.endswith("### Response: Let's think step by step.")
    assert prompt == tokenizer(text).input_ids
    assert added_text(tokenizer, prompt, new) == answer  # which follows at once
    row = chat(("user", "who ?"), ("assistant", answer), ("user", "so"), ("assistant", "x"))
    document = Encoder(tokenizer, "chat", "auto", "answers")(row)
    rendered = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    assert document.tokens.tolist() == tokenizer(rendered, add_special_tokens=False).input_ids


def test_a_text_that_begins_with_bos_gets_no_second_one():
    tokenizer = word_tokenizer()
    for text in ("mary sings .", "<bos> mary sings ."):
        document = Encoder(tokenizer, "text", "auto", "answers")({"text": text})
        assert words(tokenizer, document) == "<bos> mary* sings* .* <eos>*"


def test_a_tokenizer_without_eos():
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS to end an answer with"):
        Encoder(tokenizer, "plain", "auto", "answers")
