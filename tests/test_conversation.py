"""A chat over one compressed cache."""

import json
import sys

import eval_toys
import pytest
from tokenizer_toys import CHAT, sentencepiece

import kvjax
from kvjax import conversation
from kvjax.chat import document_ids, turn_ids
from kvjax.cli import main
from kvjax.conversation import Conversation, ask

SAYS = ["mary went home", "where is mary ?", "who went home ?"]
SHORT = {"max_new_tokens": 4, "eos_ids": ()}


@pytest.fixture(scope="module")
def toy():
    loaded = eval_toys.loaded(chat=True)
    return loaded.model, loaded.params, loaded.tokenizer


def test_nothing_is_lost_with_everything_kept(toy):
    state, ids = Conversation(), []
    for number, message in enumerate(SAYS):
        state, out = ask(*toy, state, message, **SHORT)
        turn = turn_ids(toy[2], message, number)
        ids += turn.message + turn.opening
        want = kvjax.generate(*toy[:2], [ids], **SHORT)
        assert out.tokens == want.tokens
        ids += out.tokens[0]
    assert state.answered == len(SAYS) and state.context.length + len(state.rest) == len(ids)
    assert [*state.ids, *state.rest] == ids


def test_a_long_chat_is_compressed_again(toy, monkeypatch):
    monkeypatch.setattr(conversation, "AGAIN", 30)
    state, kept = Conversation(), []
    policy = "snapkv:kv_size=12,observed=4"
    for message in ["mary went home " * 5, "where is mary ?", "john sings . " * 5]:
        state, _ = ask(*toy, state, message, policy, **SHORT)
        kept.append((state.compressed, state.context.length))
    assert [compressed == length for compressed, length in kept] == [True, False, True]
    fresh = kvjax.compress(*toy[:2], state.ids, policy, chat=True)
    assert state.context.nbytes == fresh.nbytes


def test_a_policy_that_drops_nothing_never_reads_the_chat_again(toy, monkeypatch):
    monkeypatch.setattr(conversation, "AGAIN", 0)
    state, lengths = Conversation(), []
    for message in SAYS:
        state, _ = ask(*toy, state, message, "full:entries=int4", **SHORT)
        lengths.append(state.context.length)
    assert state.compressed == lengths[0] < lengths[1] < lengths[2] == len(state.ids)


def test_a_chat_about_a_document(toy):
    model, params, tokenizer = toy
    context = kvjax.compress(model, params, document_ids(tokenizer, "mary sings ."), "full", True)
    state, out = ask(*toy, Conversation.after(context), "where is mary ?", **SHORT)
    again = kvjax.generate_text(*toy, "where is mary ?", context=context, **SHORT)
    assert out.tokens == again.tokens and state.ids is None
    plain = kvjax.compress(model, params, [1, 5, 6], "full")
    with pytest.raises(ValueError, match="the context began without the chat template"):
        Conversation.after(plain)
    with pytest.raises(ValueError, match="the message is empty"):
        ask(*toy, state, "")
    with pytest.raises(ValueError, match="got a system message with a context"):
        kvjax.generate_text(*toy, "x", context=context, system="so")


# --- The command line -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = eval_toys.checkpoint(tmp_path_factory.mktemp("tiny") / "model")
    sentencepiece(chat_template=CHAT).save_pretrained(path)
    return str(path)


class Lines:
    """Standard input that is no terminal."""

    def __init__(self, text):
        self.lines = text.splitlines(keepends=True)

    def isatty(self):
        return False

    def readline(self):
        return self.lines.pop(0) if self.lines else ""

    def read(self):
        return "".join(self.lines)


def run(*args):
    main([str(arg) for arg in args])


def test_chat(checkpoint, tmp_path, monkeypatch, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "chat.json"
    text.write_text("the return x " * 9)
    monkeypatch.setattr(sys, "stdin", Lines("the x ?\n\nin\n"))
    few = ("--max-new-tokens", 3)
    kept = ("--policy", "snapkv:kv_size=12")
    run("chat", checkpoint, "--document", text, *kept, *few, "--json", out)
    rows = json.loads(out.read_text())
    assert [row["message"] for row in rows] == ["the x ?", "in"]
    said = capsys.readouterr()
    assert said.out == "".join(f"{row['answer']}\n" for row in rows)
    assert said.err.count("tokens/s]") == 2 and rows[0]["cache_bytes"] < rows[0]["full_cache_bytes"]
    # The same with a saved context.
    run("compress", checkpoint, text, tmp_path / "text.kv", *kept)
    monkeypatch.setattr(sys, "stdin", Lines("the x ?\n"))
    run("chat", checkpoint, "--context", tmp_path / "text.kv", *few, "--json", out)
    assert json.loads(out.read_text())[0]["answer"] == rows[0]["answer"]
    run("generate", checkpoint, "the x ?", "--context", tmp_path / "text.kv", *few, "--json", out)
    assert json.loads(out.read_text())["text"] == rows[0]["answer"]


@pytest.mark.parametrize("model", ["CHECKPOINT", "builtin:needle"])
def test_compress_keeps_every_token_by_default(checkpoint, tmp_path, model):
    text, out = tmp_path / "text.txt", tmp_path / "c.json"
    text.write_text("the return x")
    name = checkpoint if model == "CHECKPOINT" else model
    run("compress", name, text, tmp_path / "text.kv", "--json", out)
    report = json.loads(out.read_text())
    assert report["policy"] == "full:entries=int8" and report["chat"] == (name == checkpoint)


def test_where_a_prompt_comes_from(checkpoint, tmp_path, monkeypatch, capsys):
    file, few = tmp_path / "prompt.txt", ("--max-new-tokens", 2)
    file.write_text("the x\n")
    texts = []
    for given in (("the x\n",), ("-",), ("--prompt-file", file)):
        monkeypatch.setattr(sys, "stdin", Lines("the x\n"))
        run("generate", checkpoint, *given, *few, "--policy", "snapkv:kv_size=64")
        said = capsys.readouterr()
        texts.append(said.out)
        assert "kv_size=64 keeps all of them" in said.err
    assert texts[0] == texts[1] == texts[2]
    for given in ((), ("the x", "--prompt-file", file)):
        with pytest.raises(SystemExit):
            run("generate", checkpoint, *given)
        assert "expected PROMPT or --prompt-file FILE" in capsys.readouterr().err


def test_an_answer_that_is_stopped(checkpoint, capsys):
    run("generate", checkpoint, "the x", "--max-new-tokens", 20, "--raw")
    whole = capsys.readouterr().out.rstrip("\n")
    stop = whole[4:6]
    run("generate", checkpoint, "the x", "--max-new-tokens", 20, "--raw", "--stop", stop)
    said = capsys.readouterr()
    assert said.out.rstrip("\n") == whole[: whole.find(stop)]
    assert int(said.err.split(" tokens;")[0].split("[")[1]) < 20


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (("chat", "builtin:needle"), "no chat template: use `kvjax generate`"),
        (("chat", "CHECKPOINT", "--context", "x", "--system", "y"), "--context has a policy"),
        (("chat", "CHECKPOINT", "--document", "no.txt"), "no file at no.txt"),
        (("generate", "CHECKPOINT", "x", "--stop", ""), "stop has ''"),
    ],
)
def test_refused(checkpoint, capsys, args, line):
    with pytest.raises(SystemExit):
        run(*(checkpoint if arg == "CHECKPOINT" else arg for arg in args))
    assert line in capsys.readouterr().err
