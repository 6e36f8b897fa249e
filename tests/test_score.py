"""`kvjax score`: its examples, its files, and what happens when it is interrupted."""

import copy
import json
import shutil

import numpy as np
import pytest
from full_disk import full_disk

import kvjax
from kvjax.cli import main
from kvjax.commands import score as command
from kvjax.headkv import load_scores
from kvjax.headkv.examples import COPIED_LENGTH, QUESTIONS, Grid, make_examples
from kvjax.policies.importance import split_half
from kvjax.tasks import WordVocabulary
from kvjax.tasks.prompt import read_haystack
from kvjax.tasks.words import TokenizerVocabulary

MODEL = "builtin:needle"
ARGUMENTS = "--estimator copying --samples 10 --length 128 --batch-size 2"


@pytest.fixture(scope="module")
def tokenizer():
    return kvjax.load_tokenizer(MODEL)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text of 40 different sentences of 9 words and a full stop."""
    path = tmp_path_factory.mktemp("text") / "story.txt"
    places = ["river", "forest", "house", "garden", "market", "bridge", "tower", "valley"]
    animals = ["fox", "wolf", "bear", "horse", "cow"]
    lines = [f"the {a} walks near\nthe {p} under the\twindow . " for a in animals for p in places]
    path.write_text("".join(lines))
    return path


def score(out, arguments=ARGUMENTS):
    main(["score", MODEL, str(out), *arguments.split()])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The score file and its companion from a run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "heads.json"
    score(out)
    assert {path.name for path in out.parent.iterdir()} == {"heads.json", "heads.meta.json"}
    return out


def same_files(a, b):
    return all(
        (a.parent / name).read_bytes() == (b.parent / name).read_bytes()
        for name in ("heads.json", "heads.meta.json")
    )


def interrupt_after(count, monkeypatch):
    """Lets so many batches be written, then stops the run as Ctrl-C does."""
    append, written = command.append_batch, []

    def stop(path, batch):
        if len(written) == count:
            raise KeyboardInterrupt
        written.append(batch.indices)
        append(path, batch)

    monkeypatch.setattr(command, "append_batch", stop)


def test_an_interrupted_run_continues_and_writes_the_same_file(whole, tmp_path, monkeypatch):
    out = tmp_path / "heads.json"
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        with pytest.raises(SystemExit, match="130"):
            score(out)
    unfinished = tmp_path / "heads.partial.jsonl"
    lines = unfinished.read_text().splitlines()
    assert len(lines) == 3 and not out.exists()
    # The end of the second batch was never written.
    unfinished.write_text("\n".join(lines)[:-40])
    measured = []
    append = command.append_batch
    monkeypatch.setattr(
        command,
        "append_batch",
        lambda path, batch: (measured.append(batch.indices), append(path, batch)),
    )
    score(out)
    finished = tuple(json.loads(lines[1])["indices"])
    assert finished not in measured and tuple(json.loads(lines[2])["indices"]) in measured
    assert same_files(out, whole) and not unfinished.exists()


def test_a_full_disk_is_one_line_and_the_same_command_finishes(whole, tmp_path, capsys):
    out = tmp_path / "heads.json"
    with full_disk(200):
        assert "File too large" in fails(capsys, out, ARGUMENTS)
    assert not out.exists()
    score(out)
    assert same_files(out, whole) and not (tmp_path / "heads.partial.jsonl").exists()


def test_a_finished_run_says_so(whole, tmp_path, capsys, monkeypatch):
    out = tmp_path / "scores" / "heads.json"
    shutil.copytree(whole.parent, out.parent)
    with monkeypatch.context() as patch:
        interrupt_after(0, patch)
        score(out)
        assert capsys.readouterr().err == f"{out} is finished: nothing is left to do\n"
        # Killed between the scores and their meta file: the scores are not those of its request.
        out.write_text(out.read_text().replace("0.", "0.5", 1))
        with pytest.raises(SystemExit, match="130"):
            score(out)
    score(out)
    assert same_files(out, whole)


def test_a_run_with_other_settings_is_refused(tmp_path, monkeypatch, capsys):
    out = tmp_path / "heads.json"
    interrupt_after(1, monkeypatch)
    with pytest.raises(SystemExit, match="130"):
        score(out)
    line = fails(capsys, out, f"{ARGUMENTS} --seed 7")
    assert "holds an unfinished run with other settings (seed 0, now 7" in line
    lines = (tmp_path / "heads.partial.jsonl").read_text().splitlines(keepends=True)
    request = json.loads(lines[0])
    changed = json.dumps(request | {"weights": "0" * 12}) + "\n"  # as if trained in between
    (tmp_path / "heads.partial.jsonl").write_text(changed + "".join(lines[1:]))
    named = f"other settings (weights 000000000000, now {request['weights']})"
    assert named in fails(capsys, out, ARGUMENTS)
    (tmp_path / "heads.partial.jsonl").write_text("[]\n{}\n")
    assert "remove the file to start over" in fails(capsys, out, ARGUMENTS)


def test_a_run_that_ends_in_an_error_leaves_nothing_behind(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("kvjax.commands.score.score_examples", _raise)
    assert fails(capsys, tmp_path / "heads.json", ARGUMENTS) == "kvjax: error: none answered"
    assert not list(tmp_path.iterdir())


def _raise(*_args):
    raise ValueError("none answered")


def test_the_file_says_what_was_measured(whole, tokenizer):
    model, params = kvjax.load(MODEL, dtype="float32")
    scores = load_scores(whole, model.config)
    assert scores.samples.shape == (model.config.num_layers, 8, 10)
    assert scores.meta["model"] == "needle" and scores.meta["length"] == 128
    depths = [sample["depth"] for sample in scores.meta["samples"]]
    np.testing.assert_allclose(depths, np.linspace(0, 1, 10), atol=0.02)
    again = kvjax.headkv.score_heads(
        model, params, tokenizer, "copying", samples=10, length=128, batch_size=2
    )
    np.testing.assert_array_equal(again.samples, scores.samples)
    # The command also writes which weights it measured, and for which request.
    own = {name: scores.meta[name] for name in ("weights", "request", "digest")}
    assert again.meta | own == scores.meta


def test_copying_finds_the_layers_of_the_questions(tokenizer):
    """Random tokens, which need no understanding, point at the layers that answer questions."""
    model, params = kvjax.load(MODEL, dtype="float32")
    for estimator in ("copying", "enhanced_retrieval"):
        scores = kvjax.headkv.score_heads(
            model, params, tokenizer, estimator, samples=8, length=112
        )
        by_layer = scores.mean.sum(axis=1)
        assert by_layer[3:].sum() > 0.7 * by_layer.sum(), estimator


def test_gradient_from_the_command_line(tmp_path):
    report = tmp_path / "report.json"
    score(
        tmp_path / "heads.json.gz",
        f"--estimator gradient --samples 4 --length 128 --batch-size 2 --json {report}",
    )
    facts = json.loads(report.read_text())
    assert facts["accepted"] == facts["asked"] == 4
    scores = load_scores(tmp_path / "heads.json.gz")
    assert facts["split_half"] == round(split_half(scores), 4)
    assert facts["best_score"] == round(scores.mean.max(), 4)


@pytest.mark.parametrize("estimator", QUESTIONS)
def test_no_two_samples_are_alike_and_all_have_filler(tokenizer, estimator):
    grid = Grid(estimator, samples=100, length=256)
    examples = make_examples(tokenizer, grid)
    assert len({example.prompt for example in examples}) == 100
    lengths = {len(example.prompt) for example in examples}
    assert max(lengths) == 256 and {128, 192} <= lengths
    asks = QUESTIONS[estimator]
    vocab = TokenizerVocabulary(tokenizer)
    for index, example in enumerate(examples[:12]):
        bare = asks(np.random.default_rng(0), vocab, None, index, 0.5, None)
        assert len(example.prompt) >= len(bare.prompt) + 10
    few, again, others = (make_examples(tokenizer, Grid(estimator, 8, 256, s)) for s in (0, 0, 1))
    assert few == again and few != others


def test_a_length_without_room_says_how_much_is_needed(tokenizer):
    with pytest.raises(ValueError, match=r"got length 40, expected ≥ \d\d+ for facts"):
        make_examples(tokenizer, Grid(length=40))


def test_random_spans_hold_no_special_tokens(tokenizer):
    vocab = TokenizerVocabulary(tokenizer)
    assert vocab.ordinary_ids == list(range(4, vocab.size))
    for example in make_examples(tokenizer, Grid("copying", samples=20)):
        assert min(example.prompt[1:]) >= 4
        start, end = example.span
        assert example.prompt[end - COPIED_LENGTH : end] == example.answer
        assert example.prompt[start : start + 4] == example.prompt[-4:]


def test_random_spans_of_a_tokenizer_without_bos_and_with_added_tokens(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.bos_token = None
    other.add_special_tokens({"additional_special_tokens": ["mary", "<tool>"]})
    mary, tool = other.convert_tokens_to_ids(["mary", "<tool>"])
    assert mary < 512 <= tool
    for example in make_examples(other, Grid("copying", samples=20)):
        assert not {0, 1, 2, 3, mary, tool} & {*example.prompt, *example.answer}


def test_facts_stand_between_the_sentences_of_the_text(tokenizer, text):
    grid = Grid("enhanced_retrieval", samples=6, length=128, haystack=text)
    for example in make_examples(tokenizer, grid):
        words = WordVocabulary().decode(example.prompt)
        start, end = example.span
        fact = WordVocabulary().decode(example.prompt[start:end])
        assert "'s favorite thing is" in fact
        outside = words.split("question :")[0].replace(fact, "")
        assert "walks near the" in outside
        before = WordVocabulary().decode(example.prompt[:start])
        # Only the last sentence is cut.
        assert before == "<bos>" or before.endswith(".") or example.depth == 1.0


def test_sentences_of_a_text(text):
    hay = read_haystack(text, WordVocabulary())
    assert len(hay.pieces) == 40 and hay.size == 400
    rng = np.random.default_rng(0)
    for length in (0, 5, 37, 400):
        pieces = hay(rng, length)
        assert sum(map(len, pieces)) == length
        joined = [token for piece in pieces for token in piece]
        story = [token for piece in hay.pieces for token in piece]
        assert any(story[i : i + length] == joined for i in range(len(story)))
    with pytest.raises(ValueError, match=r"story\.txt has 400 tokens, expected ≥ 401"):
        hay(rng, 401)


def fails(capsys, out, arguments):
    """The one line on standard error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        score(out, arguments)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("kvjax: error: ")
    return lines[0]


def test_bad_input(tmp_path, capsys, text):
    out = tmp_path / "heads.json"
    assert "expected one of retrieval" in fails(capsys, out, "--estimator magic")
    assert "samples is 0, expected a whole number from 1" in fails(capsys, out, "--samples 0")
    assert "batch_size is 0, expected a whole number from 1" in fails(capsys, out, "--batch-size 0")
    assert "got length 30, expected ≥" in fails(capsys, out, "--length 30")
    missing = tmp_path / "no.txt"
    assert f"no haystack file at {missing}" in fails(capsys, out, f"--haystack {missing}")
    shutil.copy(text, tmp_path / "short.txt")
    short = fails(capsys, out, f"--length 1024 --haystack {tmp_path / 'short.txt'}")
    assert "the haystack short.txt has 400 tokens, expected ≥" in short
    (tmp_path / "latin.txt").write_bytes("Gänse".encode("latin-1"))
    line = fails(capsys, out, f"--haystack {tmp_path / 'latin.txt'}")
    assert "latin.txt is not UTF-8 text" in line
    assert "expected no haystack" in fails(capsys, out, f"{ARGUMENTS} --haystack {text}")
    assert not out.exists() and not list(tmp_path.glob("*.partial.jsonl"))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("--length 99999", "length is 99999, expected at most 1280: the model's context"),
        ("--length 99999 --estimator need", "length is 99999, expected at most 1280: the model"),
        ("--batch-size 0", "batch_size is 0, expected a whole number from 1"),
        ("--estimator magic", "expected one of retrieval"),
    ],
)
def test_bad_input_is_refused_before_the_weights_are_read(
    tmp_path, capsys, monkeypatch, asked, said
):
    monkeypatch.setattr(command, "load", lambda *_, **__: pytest.fail("reads the weights"))
    assert said in fails(capsys, tmp_path / "heads.json", asked)


def test_curves_of_need_continue_too(tmp_path, monkeypatch):
    out, asked = tmp_path / "heads.json", "--estimator need --samples 4 --length 96 --batch-size 1"
    with monkeypatch.context() as patch:
        interrupt_after(1, patch)
        with pytest.raises(SystemExit, match="130"):
            score(out, asked)
    assert len((tmp_path / "heads.need.partial.jsonl").read_text().splitlines()) == 2
    score(out, asked)
    assert [path.name for path in tmp_path.iterdir()] == ["heads.need.json"]
    again = tmp_path / "again.need.json"
    score(again, asked)  # a name that has the ending keeps it
    assert again.read_bytes() == (tmp_path / "heads.need.json").read_bytes()
    model, _ = kvjax.load(MODEL)
    meta = kvjax.headkv.load_need(again, model.config).meta
    assert meta["kinds"] == ["needle", "two_hop"] and meta["examples"] == 4
    assert meta["model"] == "needle" and len(meta["weights"]) == 12
