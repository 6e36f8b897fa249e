"""Texts answered, continued and read: what is encoded, what ends, what is printed."""

import json
from types import SimpleNamespace

import eval_toys
import pytest
from tokenizer_toys import CHAT, sentencepiece

import kvjax
from kvjax import text_generation
from kvjax.cli import main
from kvjax.commands import text as pipeline
from kvjax.commands.text import token_rows
from kvjax.generation import Generation
from kvjax.text import added_text, prompt_ids

ANSWER = "    return x\n\n\tab é 你 # so\n"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = eval_toys.checkpoint(tmp_path_factory.mktemp("tiny") / "model")
    sentencepiece(end=True, chat_template=CHAT).save_pretrained(path)
    return path


@pytest.fixture
def said(monkeypatch):
    """Has generation say ANSWER, a few tokens at a time; what it was called with."""
    tokenizer, calls = sentencepiece(), []
    ids = tokenizer.encode(f"\n{ANSWER}", add_special_tokens=False)[2:]

    def generate(model, params, prompts, max_new_tokens, policy, on_tokens, **settings):
        calls.append({"prompts": prompts, "policy": policy, **settings})
        for start in range(0, len(ids), 4):
            for index in range(len(prompts)):
                on_tokens(index, ids[start : start + 4])
        return Generation([ids] * len(prompts), 10, 20)

    monkeypatch.setattr(text_generation, "generate", generate)
    return calls


@pytest.mark.parametrize("prompt", ["def f(x):\n", "<s>def f(x):\n"])
def test_what_is_printed_follows_the_prompt(checkpoint, tmp_path, said, capsys, prompt):
    out = str(tmp_path / "out.json")
    main(["generate", str(checkpoint), prompt, "--raw", "--json", out])
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["text"] == ANSWER and capsys.readouterr().out == f"{ANSWER}\n"
    [call] = said
    [ids] = call["prompts"]
    assert ids == sentencepiece().encode(prompt, add_special_tokens=not prompt.startswith("<s>"))
    assert ids.count(1) == 1 and ids[0] == 1 and ids[-1] != 2
    assert call["eos_ids"] == (2, sentencepiece().convert_tokens_to_ids("<|end|>"))


def test_end_ids_of_the_caller(checkpoint, said):
    for eos_ids in ((), None, [7]):
        pipeline.continue_text(str(checkpoint), "x", eos_ids=eos_ids)
    assert [call["eos_ids"] for call in said] == [(), None, [7]]


def test_a_prompt_is_a_message_of_a_chat(checkpoint, said, capsys):
    main(["generate", str(checkpoint), "the x", "--system", "return"])
    assert capsys.readouterr().out == f"{ANSWER}\n"
    asked = "<s><|system|>\nreturn<|end|>\n<|user|>\nthe x<|end|>\n<|assistant|>\n"
    assert said[0]["prompts"] == [sentencepiece().encode(asked, add_special_tokens=False)]


def test_several_prompts(said):
    pieces = [[], []]
    plain, chat = sentencepiece(), sentencepiece(chat_template=CHAT)
    loaded = eval_toys.loaded()
    out = kvjax.generate_text(
        loaded.model,
        loaded.params,
        plain,
        ["the", "x"],
        policy="snapkv:kv_size=12",
        on_text=lambda index, piece: pieces[index].append(piece),
        temperature=0.5,
    )
    assert out.texts == ["".join(each) for each in pieces] == [ANSWER] * 2
    assert out.prompts == [plain.encode("the"), plain.encode("x")] == said[0]["prompts"]
    assert (out.cache_bytes, out.full_cache_bytes) == (10, 20)
    assert (said[0]["policy"], said[0]["temperature"]) == ("snapkv:kv_size=12", 0.5)
    with pytest.raises(ValueError, match=r"got the texts of 2 prompts, expected one: read .texts"):
        _ = out.text
    again = kvjax.generate_text(loaded.model, loaded.params, chat, ["the", "x"], chat=False)
    assert again.prompts == out.prompts
    assert kvjax.generate_text(loaded.model, loaded.params, chat, "x").text == ANSWER


def test_texts_and_bytes_are_those_of_generate():
    loaded = eval_toys.loaded()
    prompts = ["where is mary ?", "mary sings . " * 9]
    ask = {"max_new_tokens": 5, "policy": "snapkv:kv_size=12"}
    out = kvjax.generate_text(loaded.model, loaded.params, loaded.tokenizer, prompts, **ask)
    ids = [prompt_ids(loaded.tokenizer, prompt) for prompt in prompts]
    want = kvjax.generate(loaded.model, loaded.params, ids, **ask)
    assert (out.prompts, out.tokens) == (ids, want.tokens)
    assert out.texts == [
        added_text(loaded.tokenizer, *each) for each in zip(ids, want.tokens, strict=True)
    ]
    assert (out.cache_bytes, out.full_cache_bytes) == (want.cache_bytes, want.full_cache_bytes)


@pytest.mark.parametrize(
    ("template", "settings", "line"),
    [
        (None, {"prompts": ["x", ""]}, "prompt 1 is empty, expected text"),
        (None, {"prompts": ""}, "the prompt is empty"),
        (None, {"prompts": []}, "got no prompts"),
        (None, {"chat": True}, "chat is True and the tokenizer has no chat template"),
        (None, {"system": "so"}, "got a system message and no chat template"),
        (CHAT, {"system": "so", "chat": False}, "got a system message and no chat template"),
        ("{{ raise_exception('no system') }}", {}, "template refuses the messages: no system"),
    ],
)
def test_texts_that_cannot_be_asked(template, settings, line):
    loaded = eval_toys.loaded()
    tokenizer = sentencepiece(chat_template=template)
    with pytest.raises(ValueError, match=line):
        kvjax.generate_text(loaded.model, loaded.params, tokenizer, **{"prompts": "x", **settings})


def test_token_ids_are_no_text():
    with pytest.raises(ValueError, match=r"prompt 1 is list, expected text: kvjax.generate reads"):
        text_generation._checked.__wrapped__(["x", [1, 2]])


def test_a_context_has_no_chat(checkpoint, said):
    loaded = eval_toys.loaded()
    tokenizer = sentencepiece(chat_template=CHAT)
    context = kvjax.compress(loaded.model, loaded.params, [1, 5, 6], "full")
    ask = (loaded.model, loaded.params, tokenizer, " the x")
    out = kvjax.generate_text(*ask, context=context)
    assert said[0]["context"] is context
    assert out.prompts == [sentencepiece("never", start=False).encode(" the x")]
    for settings, line in (
        ({"chat": True}, "chat is True with a context"),
        ({"system": "x"}, "a sy"),
    ):
        with pytest.raises(ValueError, match=line):
            kvjax.generate_text(*ask, context=context, **settings)


@pytest.mark.parametrize("question", [" the x", "\nx", "return"])
def test_a_question_goes_on_from_its_context(checkpoint, said, monkeypatch, question):
    loaded = eval_toys.loaded()
    held = kvjax.compress(loaded.model, loaded.params, [1, 5, 6, 7] * 4, "snapkv:kv_size=12")
    monkeypatch.setattr(pipeline, "load_context", lambda *_: held)
    for written in (f"<s>{question}", question):
        report = pipeline.continue_text(str(checkpoint), written, context=checkpoint / "text.kv")
    [first], [ids] = said[0]["prompts"], said[1]["prompts"]
    assert first == ids  # the context begins with BOS
    whole = sentencepiece().encode(f".{question}", add_special_tokens=False)
    dot = sentencepiece().encode(".", add_special_tokens=False)
    assert [*dot, *ids] == whole
    assert (report["text"], report["policy"]) == (ANSWER, held.policy)


@pytest.mark.parametrize("begin", ["", "<s>"])
def test_texts_that_are_read_begin_with_one_bos(checkpoint, tmp_path, monkeypatch, begin):
    file, read = tmp_path / "text.txt", []
    file.write_text(f"{begin}the return")
    expected = sentencepiece().encode(f"{begin}the return", add_special_tokens=not begin)
    assert expected[0] == 1 and expected.count(1) == 1

    def compress(model, params, ids, policy, chat):
        read.append(ids)
        return SimpleNamespace(length=len(ids), nbytes=1, save=lambda path: path.touch())

    monkeypatch.setattr(pipeline, "compress", compress)
    out = tmp_path / "text.kv"
    report = pipeline.compress_text(str(checkpoint), file, out, "full", "float32", False)
    assert read == [expected] and report["tokens"] == len(expected)
    rows = token_rows(str(checkpoint), file, 100, len(expected))
    assert rows.tolist() == [expected]
