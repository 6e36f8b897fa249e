"""Every format: the prompt and answer of a row, and clear errors for rows that don't fit."""

import pytest

from train.data.formats import FORMATS, ROLES, Message, prompt_pieces, read_messages

METAMATH = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{}\n\n### Response: Let's think step by step."
)
SC2 = "### Instruction\n{}\n\n### Response\n"

INSTRUCT = {
    "metamath": (
        {"query": "1 {x}?", "response": "The answer is: 2", "type": "GSM_SV"},
        METAMATH.format("1 {x}?"),
        "The answer is: 2",
    ),
    "sc2": (
        {"instruction": "Add.", "response": "```python\nadd\n```", "seed": ""},
        SC2.format("Add."),
        "```python\nadd\n```",
    ),
    "gsm8k": (
        {
            "question": "How many?",
            "answer": "48/2 = <<48/2=24>>24 clips.\nAll <<24=24>>24.\n#### 1,024",
        },
        METAMATH.format("How many?"),
        "48/2 = 24 clips.\nAll 24.\n#### 1,024\nThe answer is: 1,024",
    ),
    "mbpp": (
        {"text": "Write f.", "code": "def f():\r\n\treturn 1 \r\n", "task_id": 1},
        SC2.format("Write f."),
        "```python\ndef f():\n\treturn 1\n```",
    ),
    "plain": ({"query": "who", "response": "mary"}, "who", " mary"),
}


@pytest.mark.parametrize("form", INSTRUCT)
def test_questions_and_answers(form):
    row, prompt, answer = INSTRUCT[form]
    pieces = prompt_pieces(form, read_messages(form, row))
    assert [tuple(piece) for piece in pieces] == [(prompt, False), (answer, True)]


@pytest.mark.parametrize(
    "row",
    [
        {"output": "\nSo x is 4.\n#### 4\nThe answer is: 4", "answer": "4"},
        {"inv_question_pred_answer": "Let's think step by step.\nSo x is 4.", "answer": "4"},
    ],
)
def test_backward_questions_come_in_two_forms(row):
    messages = read_messages("gsm8k_backward", {"question": "x?", **row})
    assert messages[0] == Message("user", "x?")
    assert messages[1] == Message("assistant", "So x is 4.\n#### 4\nThe answer is: 4")


def test_text():
    messages = read_messages("text", {"text": "Once.", "id": 3})
    assert messages == [Message("text", "Once.")]
    assert [tuple(piece) for piece in prompt_pieces("text", messages)] == [("Once.", True)]


def test_chat():
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello")]
    openai = {"messages": [{"role": role, "content": text} for role, text in turns], "source": "x"}
    names = {right: name for name, right in ROLES.items()}
    sharegpt = {
        "conversations": [{"from": names.get(role, role), "value": text} for role, text in turns]
    }
    expected = [Message(*turn) for turn in turns]
    assert read_messages("chat", openai) == read_messages("chat", sharegpt) == expected


@pytest.mark.parametrize("key", ["reasoning_content", "thinking"])
def test_reasoning_stands_before_the_answer(key):
    answer = {"role": "assistant", "content": "4", key: "2 and 2\n"}
    messages = read_messages("chat", {"messages": [{"role": "user", "content": "?"}, answer]})
    assert messages[1].content == "<think>\n2 and 2\n</think>\n\n4"
    answer[key] = None
    assert read_messages("chat", {"messages": [answer]}) == [Message("assistant", "4")]


@pytest.mark.parametrize(
    ("form", "row", "message"),
    [
        ("metamath", {"query": "a", "answer": "b"}, "got columns query, answer; .*query, response"),
        ("chat", {}, "got columns none; format 'chat' expects messages or conversations"),
        ("metamath", {"query": "a", "response": 3}, "'response' is int, expected text"),
        ("metamath", {"query": "a", "response": " "}, "no answer to learn"),
        ("sc2", {"instruction": "a", "response": None}, "no answer to learn"),
        ("text", {"text": ""}, "no answer to learn"),
        ("mbpp", {"text": "a", "code": "\r\n"}, "no answer to learn"),
        ("gsm8k", {"question": "a", "answer": ""}, "no answer to learn"),
        (
            "gsm8k",
            {"question": "a", "answer": "it is 4"},
            "ending 'it is 4', expected a line '#### N'",
        ),
        (
            "gsm8k_backward",
            {"question": "a", "inv_question_pred_answer": "", "answer": "4"},
            "no answer to learn",
        ),
        ("chat", {"messages": []}, r"no answer to learn \(turns: none\)"),
        ("chat", {"messages": [{"role": "user", "content": "a"}]}, r"no answer .*\(turns: user\)"),
        ("chat", {"messages": "hello"}, "'messages' is str, expected a list of turns"),
        ("chat", {"messages": ["hello"]}, r"messages\[0\]: got str; expected role, content"),
        (
            "chat",
            {"conversations": [{"role": "user"}]},
            r"conversations\[0\]: got role; expected from",
        ),
        (
            "chat",
            {"messages": [{"role": "user", "content": ["a"]}]},
            r"messages\[0\]: 'content' is list, expected text",
        ),
    ],
)
def test_rows_that_do_not_fit(form, row, message):
    with pytest.raises(ValueError, match=message):
        read_messages(form, row)


def test_every_format_is_tested():
    assert {*INSTRUCT, "gsm8k_backward", "text", "chat"} == set(FORMATS)
