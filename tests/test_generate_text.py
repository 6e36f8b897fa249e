"""Texts continued and read by the commands: what is encoded, what ends, what is printed."""

import json
from types import SimpleNamespace

import eval_toys
import pytest
from tokenizer_toys import CHAT, sentencepiece

from kvjax.cli import main
from kvjax.commands import text as pipeline
from kvjax.commands.text import token_rows
from kvjax.generation import Generation

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

    def generate(model, params, prompts, on_tokens, **settings):
        calls.append({"prompts": prompts, **settings})
        for start in range(0, len(ids), 4):
            on_tokens(0, ids[start : start + 4])
        return Generation([ids], 10, 20)

    monkeypatch.setattr(pipeline, "generate", generate)
    return calls


@pytest.mark.parametrize("prompt", ["def f(x):\n", "<s>def f(x):\n"])
def test_what_is_printed_follows_the_prompt(checkpoint, tmp_path, said, capsys, prompt):
    main(["generate", str(checkpoint), prompt, "--json", str(tmp_path / "out.json")])
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["text"] == ANSWER and capsys.readouterr().out == f"{ANSWER}\n"
    [call] = said
    [ids] = call["prompts"]
    assert ids == sentencepiece().encode(prompt, add_special_tokens=not prompt.startswith("<s>"))
    assert ids.count(1) == 1 and ids[0] == 1 and ids[-1] != 2
    assert call["eos_ids"] == (2, sentencepiece().convert_tokens_to_ids("<|end|>"))


def test_end_ids_of_the_caller(checkpoint, said):
    for eos_ids in ((), None, [7]):
        pipeline.generate_text(str(checkpoint), "x", eos_ids=eos_ids)
    assert [call["eos_ids"] for call in said] == [(), None, [7]]


@pytest.mark.parametrize("question", [" the x", "\nx", "return"])
def test_a_question_goes_on_from_its_context(checkpoint, said, monkeypatch, question):
    held = SimpleNamespace(policy="snapkv:kv_size=12")
    monkeypatch.setattr(pipeline, "load_context", lambda *_: held)
    for written in (f"<s>{question}", question):
        report = pipeline.generate_text(str(checkpoint), written, context=checkpoint / "text.kv")
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

    def compress(model, params, ids, policy):
        read.append(ids)
        return SimpleNamespace(length=len(ids), nbytes=1, save=lambda path: path.touch())

    monkeypatch.setattr(pipeline, "compress", compress)
    out = tmp_path / "text.kv"
    report = pipeline.compress_text(str(checkpoint), file, out, "full", "float32")
    assert read == [expected] and report["tokens"] == len(expected)
    rows = token_rows(str(checkpoint), file, 100, len(expected))
    assert rows.tolist() == [expected]
