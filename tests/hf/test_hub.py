"""What is downloaded of a hub id: small files for a look, and one copy of the weights to load."""

import json
import shutil
import types

import huggingface_hub
import jax
import numpy as np
import pytest
from eval_toys import checkpoint
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects
from toys import random_params

import eval.__main__
import kvjax
import kvjax.cli
import train.__main__
from kvjax.checkpoint_files import INDEX, SINGLE
from kvjax.commands.checkpoints import describe
from kvjax.hf import layout_of, open_params, read_model, read_shape, stored_tensors
from kvjax.hf.config import config_from_hf
from kvjax.hf.source import hub_files, hub_weights
from kvjax.nn import Transformer
from kvjax.policies.importance import default_scores

ID = "org/name"
OTHERS = (
    "consolidated.safetensors",
    "model.fp16.safetensors",
    "model.safetensors.index.fp16.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "original/consolidated.00.pth",
    "original/params.json",
    "original/tokenizer.model",
    "onnx/model.onnx",
    "checkpoint-500/config.json",
    "checkpoint-500/model.safetensors",
    "trainer_state.json",
    "README.md",
)
"""What a repository may hold besides; none of it is asked for."""


class Hub:
    """A hub with one repository, a local folder; notes which of its files are downloaded."""

    def __init__(self, repository, cache):
        self.repository, self.cache = repository, cache
        self.calls, self.revisions = 0, {None}

    @property
    def files(self):
        paths = (path for path in self.repository.rglob("*") if path.is_file())
        return {path.relative_to(self.repository).as_posix() for path in paths}

    @property
    def fetched(self):
        paths = (path for path in self.cache.rglob("*") if path.is_file())
        return {path.relative_to(self.cache).as_posix() for path in paths}

    def snapshot_download(self, repo_id, revision, allow_patterns):
        assert repo_id == ID and revision in self.revisions
        self.calls += 1
        self.cache.mkdir(exist_ok=True)
        for file in filter_repo_objects(self.files, allow_patterns=allow_patterns):
            (self.cache / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.repository / file, self.cache / file)
        return str(self.cache)

    def model_info(self, repo_id, revision, timeout):
        assert repo_id == ID and revision in self.revisions
        names = [types.SimpleNamespace(rfilename=file) for file in sorted(self.files)]
        return types.SimpleNamespace(siblings=names)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny model with tokenizer, head scores, licence, and weights in one file."""
    path = checkpoint(tmp_path_factory.mktemp("hub") / "model")
    (path / "LICENSE").write_text("free")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    return path


@pytest.fixture
def small(source):
    return {path.name for path in source.iterdir() if path.suffix != ".safetensors"}


@pytest.fixture
def repository(source, tmp_path):
    """The same in several shards, beside other copies of the weights."""
    path = tmp_path / "repository"
    shutil.copytree(source, path)
    (path / SINGLE).unlink()
    (path / "config.json").unlink()
    model, params = kvjax.load(source, dtype="float32")
    kvjax.save(model, params, path, layout="hf", max_shard_bytes=20_000)
    for name in OTHERS:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("not to be read")
    return path


@pytest.fixture
def fake(repository, tmp_path, monkeypatch):
    fake = Hub(repository, tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", fake.snapshot_download)
    monkeypatch.setattr("huggingface_hub.model_info", fake.model_info)
    return fake


SIZE = ("--batch-size", "8", "--sequence-length", "16")


def same(params, others):
    """Whether two trees hold the same values."""
    return jax.tree.all(jax.tree.map(np.array_equal, params, others))


def shards(folder):
    return {path.name for path in folder.glob("model-*-of-*.safetensors")}


@pytest.mark.parametrize(
    "look",
    [
        read_model,
        read_shape,
        layout_of,
        describe,
        kvjax.load_tokenizer,
        lambda name: kvjax.cli.main(["info", name]),
        lambda name: default_scores(read_model(name).config).mean,  # pyright: ignore
        lambda name: eval.__main__.main(
            ["needle", "--model", name, "--dry-run", "--lengths", "48", "--policy", "headkv"]
        ),
        lambda name: train.__main__.main(["finetune", "--model", name, "--dry-run", *SIZE]),
    ],
)
def test_a_look_downloads_no_weights(fake, small, look):
    look(ID)
    assert fake.fetched == small | {INDEX}


@pytest.mark.parametrize("read", [kvjax.load, open_params, stored_tensors])
def test_shards_are_what_the_index_names(fake, small, repository, read):
    (repository / "model-00001-of-00099.safetensors").write_text("of another day")
    named = {*json.loads((repository / INDEX).read_text())["weight_map"].values()}
    read(ID)
    assert len(named) > 1 and fake.fetched == small | {INDEX} | named


def test_a_model_of_the_hub_is_the_model_of_the_folder(fake, source):
    model, params = kvjax.load(ID, dtype="float32")
    there, expected = kvjax.load(source, dtype="float32")
    assert model == there
    assert same(params, expected)


def test_a_revision_of_a_model(fake, source):
    fake.revisions = {"v2"}
    model, params = kvjax.load(f"{ID}@v2", dtype="float32")
    expected = kvjax.load(source, dtype="float32")
    assert model == expected[0] and same(params, expected[1])
    assert kvjax.load_tokenizer(f"{ID}@v2")("mary").input_ids
    with pytest.raises(ValueError, match=f"^{ID}@ names no revision after @"):
        kvjax.load(f"{ID}@")


@pytest.mark.parametrize("folder", ["one", "two/three [4]/"])
def test_a_folder_in_a_repository(fake, small, repository, folder, tmp_path):
    """The files beside the folder are another model's."""
    fake.revisions = {"main"}
    named = shards(repository)
    repository.rename(tmp_path / "inner")
    (repository / folder).parent.mkdir(parents=True)
    (tmp_path / "inner").rename(repository / folder)
    (repository / "config.json").write_text("{}")
    model, _ = kvjax.load(f"{ID}@main/{folder}")
    assert model.config.source == str(fake.cache / folder)
    wanted = small | {INDEX} | named
    assert fake.fetched == {f"{folder.strip('/')}/{name}" for name in wanted}


def test_a_single_file(fake, small, source, repository):
    for name in shards(repository) | {INDEX}:
        (repository / name).unlink()
    shutil.copy(source / SINGLE, repository)
    kvjax.load(ID)
    assert fake.fetched == small | {SINGLE}


def test_a_single_file_beside_an_index_is_enough(fake, small, source, repository):
    shutil.copy(source / SINGLE, repository)
    assert hub_weights(ID, hub_files(ID)) == fake.cache
    assert fake.fetched == small | {SINGLE, INDEX}


def test_the_native_layout(fake, source, repository):
    model, params = kvjax.load(source, dtype="float32")
    shutil.rmtree(repository)
    kvjax.save(model, params, repository)
    arrays = {file for file in fake.files if file.startswith("params/")}
    (repository / SINGLE).write_text("another copy")
    assert layout_of(ID) == "native"
    assert fake.fetched == {"kvjax.json"}
    loaded, again = kvjax.load(ID, dtype="float32")
    assert loaded == model and same(again, params)
    assert fake.fetched == {"kvjax.json"} | arrays


def test_info_says_whose_dtype_it_is(fake, repository, source):
    assert describe(ID)["layout"] == "hf, float32 by its config, weights not downloaded"
    raw = json.loads((repository / "config.json").read_text())
    del raw["torch_dtype"]
    (repository / "config.json").write_text(json.dumps(raw))
    assert describe(ID)["layout"] == "hf, weights not downloaded"
    kvjax.load(ID)
    assert describe(ID)["layout"] == "hf, float32"
    assert describe(str(source))["layout"] == "hf, float32"


def test_info_of_tensors_reads_weights(fake, tmp_path):
    out = tmp_path / "info.json"
    kvjax.cli.main(["info", ID, "--tensors", "model.norm.weight", "--json", str(out)])
    assert [row["tensor"] for row in json.loads(out.read_text())["tensors"]] == [
        "model.norm.weight"
    ]
    assert SINGLE not in fake.fetched and "consolidated.safetensors" not in fake.fetched


def test_a_conversion_takes_the_companions_along(fake, tmp_path):
    kvjax.cli.main(["convert", ID, str(tmp_path / "out")])
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"LICENSE", "chat_template.jinja", "tokenizer.json", "head_scores.json"} <= names
    assert not fake.fetched & set(OTHERS)


def test_a_model_that_is_not_supported_is_not_downloaded(fake, repository, small):
    raw = json.loads((repository / "config.json").read_text()) | {"model_type": "mamba"}
    (repository / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="model_type is 'mamba', expected one of"):
        kvjax.load(ID)
    assert fake.fetched == small | {INDEX}


def test_a_missing_shard(fake, repository):
    lost = sorted(shards(repository))[-1]
    (repository / lost).unlink()
    with pytest.raises(ValueError, match=rf"^found no {lost} of org/name, .* names them$"):
        kvjax.load(ID)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"weight_map": ["model.safetensors"]}', ": weight_map is .*, expected an object"),
        ('{"metadata": {}}', ": weight_map is missing, expected an"),
        ("[" * 100_000, "is not JSON: "),
        ("version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer"),
    ],
)
def test_a_broken_index(fake, repository, text, message):
    (repository / INDEX).write_text(text)
    with pytest.raises(ValueError, match=rf"{INDEX} ?{message}"):
        kvjax.load(ID)


@pytest.mark.parametrize(
    "files, message",
    [
        (["pytorch_model.bin"], "; it has pytorch_model.bin, which kvjax does not read$"),
        (["model.fp16.safetensors"], "; it has model.fp16.safetensors, which kvjax does not"),
        (["a.bin", "b.pth", "c.h5", "d.onnx"], "has a.bin, b.pth, c.h5 and 1 more,"),
        ([], "in the local hub cache$"),
    ],
)
def test_other_formats_are_named(fake, repository, files, message):
    for file in (*OTHERS, *shards(repository), INDEX):
        (repository / file).unlink()
    for file in files:
        (repository / file).write_text("")
    with pytest.raises(ValueError, match=f"^found neither {SINGLE} nor .*{message}"):
        kvjax.load(ID)
    for file in repository.iterdir():
        if file.name not in files and file.is_file():
            file.unlink()
    shutil.rmtree(fake.cache)
    for read in (kvjax.load, kvjax.load_tokenizer, describe):
        with pytest.raises(ValueError, match=f"^found neither config.json nor .*{message}"):
            read(ID)


def test_a_hub_that_lists_nothing(fake, repository, monkeypatch):
    def unreachable(*args, **settings):
        raise TimeoutError

    monkeypatch.setattr("huggingface_hub.model_info", unreachable)
    for file in (*shards(repository), INDEX):
        (repository / file).unlink()
    with pytest.raises(ValueError, match=r"^found neither model.* cache; the hub is unre"):
        kvjax.load(ID)


# --- Without the hub -------------------------------------------------------------------------


@pytest.fixture
def cached(repository, tmp_path, monkeypatch):
    """The hub's own client, offline, with the repository in its cache; the snapshot's folder."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    commit = "0123456789" * 4
    place = tmp_path / "hub" / "models--org--name"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    shutil.copytree(repository, place / "snapshots" / commit)
    return place / "snapshots" / commit


def test_offline_what_is_cached_is_enough(cached, source):
    (cached / "LICENSE").unlink()
    model, params = kvjax.load(ID, dtype="float32")
    there, expected = kvjax.load(source, dtype="float32")
    assert model == there and same(params, expected)
    assert len(kvjax.load_tokenizer(ID)) == len(kvjax.load_tokenizer(source))


def test_offline_a_look_needs_no_weights(cached):
    for file in shards(cached):
        (cached / file).unlink()
    assert read_model(ID).config.num_layers == 2
    assert describe(ID)["layout"] == "hf, float32 by its config, weights not downloaded"
    with pytest.raises(ValueError, match=r"^found no model-0.* and \d+ more .* the hub is unre"):
        kvjax.load(ID)


def test_offline_neither_weights_nor_an_index(cached):
    for file in (*shards(cached), INDEX):
        (cached / file).unlink()
    with pytest.raises(ValueError, match=r"^found neither model.* cache; the hub is unre"):
        kvjax.load(ID)


def test_a_snapshot_that_the_client_calls_incomplete_may_do(cached, monkeypatch):
    def download(*args, **settings):
        raise IncompleteSnapshotError("LICENSE is missing", snapshot_path=str(cached))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert kvjax.load(ID)[0] == read_model(cached)


RESPONSE = types.SimpleNamespace(headers={}, request=None, status_code=404)


@pytest.mark.parametrize(
    "error, message",
    [
        (HFValidationError("no"), "a/b is neither a directory nor a hub id"),
        (
            LocalEntryNotFoundError("no"),
            "a/b is not a directory, is not in the local hub cache, and",
        ),
        (RepositoryNotFoundError("404\nmore", response=RESPONSE), "the hub says: 404"),  # type: ignore
        (GatedRepoError("403 gated\nmore", response=RESPONSE), "the hub says: 403 gated"),  # type: ignore
        (OSError("disk full"), "the hub says: disk full"),
        (TimeoutError(), "the hub says: TimeoutError"),
        (Exception("proxy\nmore"), "the hub says: proxy"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_errors_of_the_hub_are_one_line(monkeypatch, error, message):
    def download(*args, **settings):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for read in (kvjax.load, kvjax.load_tokenizer, read_model):
        with pytest.raises(ValueError, match=message) as raised:
            read("a/b")
        assert "\n" not in str(raised.value)


def test_one_commit_is_read(fake, monkeypatch, tmp_path, repository):
    """A commit between the look and the weights: config and weights are both of the new one."""
    raw = json.loads((repository / "config.json").read_text()) | {"num_hidden_layers": 1}
    model = Transformer(config_from_hf(raw))
    look = hub_files

    def then_commit(name):
        directory = look(name)
        shutil.rmtree(repository)
        kvjax.save(model, random_params(model), repository, layout="hf")
        fake.cache = tmp_path / "next"
        return directory

    monkeypatch.setattr("kvjax.hf.source.hub_files", then_commit)
    loaded, params = kvjax.load(ID)
    assert loaded.config.num_layers == 1 and "layers_1" not in params
    assert loaded.config.source == str(tmp_path / "next")
