"""Weights are read as transformers reads them, and what means nothing is refused in one line."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from llama_toy import TINY
from toys import forward, random_params

import kvjax
from kvjax.checkpoint_files import NewTensor, collapsed, scan, write_file
from kvjax.commands.convert import EqualCacheSettings, convert_to_equal_cache
from kvjax.hf import open_params, read_model
from kvjax.hf.config import config_from_hf, matching
from kvjax.nn import Transformer

RAW = {**TINY, "torch_dtype": "float32"}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENS = np.arange(12, dtype=np.int32)[None] % 40


def write_model(directory, change=None, **config):
    """A llama in Hugging Face's layout whose tensors `change` may alter; its parameters."""
    model = Transformer(config_from_hf({**RAW, **config}))
    params = random_params(model)
    kvjax.save(model, params, directory, layout="hf")
    if change is not None:
        tensors = read_tensors(directory)
        change(tensors)
        (directory / SINGLE).unlink()
        write_tensors(directory / SINGLE, tensors)
    return params


def read_tensors(directory):
    checkpoint = scan(directory)
    return {name: np.array(checkpoint.open(name)) for name in checkpoint.tensors}


def write_tensors(path, values):
    write_file(path, [NewTensor(n, v.dtype, v.shape, lambda v=v: v) for n, v in values.items()])


def write_shards(directory, *shards, **weight_map):
    """Shards of a checkpoint, and an index of what they hold that `weight_map` may alter."""
    for number, shard in enumerate(shards, 1):
        name = f"{number}.safetensors"
        write_tensors(directory / name, shard)
        weight_map = dict.fromkeys(shard, name) | weight_map
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refusal(directory):
    with pytest.raises(ValueError) as error:
        kvjax.load(directory, dtype="float32")
    lines = str(error.value).splitlines()
    assert all(line.startswith(f"{directory}") for line in lines)
    return "\n".join(line.removeprefix(f"{directory}").lstrip(":/ ") for line in lines)


def torch_logits(directory):
    pytest.importorskip("torch")
    from tiny_checkpoints import torch_logits
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return torch_logits(AutoModelForCausalLM.from_pretrained(directory), TOKENS)


def our_logits(directory):
    return np.asarray(forward(*kvjax.load(directory, dtype="float32"), TOKENS))


# --- Output matrices of tied models ----------------------------------------------------------


def other_head(tensors):
    tensors[HEAD] = np.random.default_rng(3).standard_normal((40, 16)).astype(np.float32)


def test_a_tied_model_keeps_a_head_of_its_own(tmp_path):
    write_model(tmp_path / "a", other_head, tie_word_embeddings=True)
    model, params = kvjax.load(tmp_path / "a", dtype="float32")
    assert not model.config.tie_embeddings
    assert model == read_model(tmp_path / "a")
    head = read_tensors(tmp_path / "a")[HEAD]
    np.testing.assert_array_equal(params["lm_head"], head.T)
    np.testing.assert_array_equal(open_params(tmp_path / "a", "float32")["lm_head"], head.T)
    for layout in ("hf", "native"):
        kvjax.save(model, params, tmp_path / layout, layout=layout)
        again, read = kvjax.load(tmp_path / layout, dtype="float32")
        assert again == model
        np.testing.assert_array_equal(read["lm_head"], head.T)
    raw = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert raw == {**RAW, "tie_word_embeddings": False}
    np.testing.assert_array_equal(read_tensors(tmp_path / "hf")[HEAD], head)


@pytest.mark.parity
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_head_of_its_own_counts_as_in_transformers(tmp_path, family):
    config = {"head_dim": 8} if family == "gemma2" else {"tie_word_embeddings": True}
    write_model(tmp_path / "a", other_head, model_type=family, **config)
    want = torch_logits(tmp_path / "a")
    np.testing.assert_allclose(our_logits(tmp_path / "a"), want, atol=2e-4, rtol=0)
    kvjax.save(*kvjax.load(tmp_path / "a", dtype="float32"), tmp_path / "b", layout="hf")
    np.testing.assert_allclose(torch_logits(tmp_path / "b"), want, atol=1e-6, rtol=0)


def test_a_head_of_its_own_is_converted_layer_by_layer(tmp_path):
    write_model(tmp_path / "a", other_head, tie_word_embeddings=True)
    result = convert_to_equal_cache(
        str(tmp_path / "a"), tmp_path / "b", EqualCacheSettings(), "float32"
    )
    assert result["relative_logit_change"] < 1e-4
    model, params = kvjax.load(tmp_path / "b", dtype="float32")
    assert not model.config.tie_embeddings
    np.testing.assert_array_equal(params["lm_head"], read_tensors(tmp_path / "a")[HEAD].T)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
def test_a_head_with_the_same_numbers_is_ignored(tmp_path, dtype):
    def add(tensors):
        tensors[EMBEDDING] = tensors[EMBEDDING].astype(ml_dtypes.bfloat16)
        tensors[HEAD] = tensors[EMBEDDING].astype(dtype)

    write_model(tmp_path / "a", add, tie_word_embeddings=True)
    model, params = kvjax.load(tmp_path / "a", dtype="float32")
    assert model.config.tie_embeddings and "lm_head" not in params


def test_one_number_makes_the_difference(tmp_path):
    def add(tensors):
        tensors[HEAD] = tensors[EMBEDDING].copy()
        tensors[HEAD][-1, -1] += 1e-6

    write_model(tmp_path / "a", add, tie_word_embeddings=True)
    assert not read_model(tmp_path / "a").config.tie_embeddings


def test_a_head_of_another_shape_is_refused(tmp_path):
    def add(tensors):
        tensors[HEAD] = np.ones((48, 16), np.float32)

    write_model(tmp_path / "a", add, tie_word_embeddings=True)
    assert refusal(tmp_path / "a") == f"{HEAD} has shape (48, 16), expected (40, 16)"


def test_a_tied_model_whose_file_holds_only_the_head(tmp_path):
    """transformers ties whichever of the two is there."""
    params = write_model(
        tmp_path / "a", lambda t: t.update({HEAD: t.pop(EMBEDDING)}), tie_word_embeddings=True
    )
    model, read = kvjax.load(tmp_path / "a", dtype="float32")
    assert model.config.tie_embeddings
    np.testing.assert_array_equal(read["embedding"], params["embedding"])


def test_a_model_that_is_not_tied_needs_its_head(tmp_path):
    write_model(tmp_path / "a", lambda tensors: tensors.pop(HEAD))
    assert refusal(tmp_path / "a") == f"missing {HEAD}"


@pytest.mark.parity
def test_families_tie_as_in_transformers():
    from transformers import AutoConfig

    from kvjax.hf.families import FAMILIES

    for name, family in FAMILIES.items():
        tied = AutoConfig.for_model(name).tie_word_embeddings
        assert family.defaults.get("tie_word_embeddings", False) == tied, name


def test_a_model_read_before_its_weights(tmp_path):
    write_model(tmp_path / "a", other_head, tie_word_embeddings=True)
    early = Transformer(config_from_hf({**RAW, "tie_word_embeddings": True}))
    assert matching(early, open_params(tmp_path / "a")) == read_model(tmp_path / "a")


# --- Names -----------------------------------------------------------------------------------


def without_model(name):
    return name.removeprefix("model.")


def inside_model(name):
    return f"model.{name}"


@pytest.mark.parametrize("rename", [without_model, inside_model])
def test_names_of_the_bare_model_and_of_one_around_it(tmp_path, rename):
    def change(tensors):
        for name in list(tensors):
            tensors[rename(name)] = tensors.pop(name)

    params = write_model(tmp_path / "a", change)
    _, read = kvjax.load(tmp_path / "a", dtype="float32")
    assert jax.tree.all(jax.tree.map(np.array_equal, params, read))


@pytest.mark.parity
@pytest.mark.parametrize("rename", [without_model, inside_model])
def test_transformers_reads_these_names(tmp_path, rename):
    write_model(tmp_path / "a")
    want = our_logits(tmp_path / "a")
    tensors = read_tensors(tmp_path / "a")
    write_tensors(tmp_path / "a" / SINGLE, {rename(n): v for n, v in tensors.items()})
    np.testing.assert_allclose(torch_logits(tmp_path / "a"), want, atol=2e-4, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("prefix", ["language_model.", "base_model.model.", "_orig_mod."])
def test_another_prefix_is_named_once(tmp_path, prefix, tied):
    def change(tensors):
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)

    write_model(tmp_path / "a", change, tie_word_embeddings=tied)
    message = refusal(tmp_path / "a")
    assert re.fullmatch(
        rf"{20 + (not tied)} tensor names begin with '{prefix}', expected none of that "
        rf"\(got {prefix}(\S+), expected \1\)",
        message,
    )


def test_a_prefix_in_place_of_another(tmp_path):
    def change(tensors):
        for name in list(tensors):
            tensors[name.replace("model.", "transformer.")] = tensors.pop(name)
        del tensors["transformer.layers.1.mlp.up_proj.weight"]

    write_model(tmp_path / "a", change)
    assert refusal(tmp_path / "a") == (
        "19 tensor names begin with 'transformer.', expected 'model.' (got "
        "transformer.embed_tokens.weight, expected model.embed_tokens.weight)\nmissing "
        "model.layers.1.mlp.up_proj.weight"
    )


def test_long_lists_stay_readable():
    layers = [("missing ", f"model.layers.{i}.mlp.w1", "") for i in range(32) if i != 7]
    experts = [
        ("unexpected ", f"layers.{i}.experts.{e}.w1.weight", "") for i in (1, 2) for e in range(8)
    ]
    assert collapsed(layers[:2]) == [f"missing model.layers.{i}.mlp.w1" for i in (0, 1)]
    assert collapsed([*layers, *experts]) == [
        "missing model.layers.{0-6,8-31}.mlp.w1",
        "unexpected layers.{1-2}.experts.{0-7}.w1.weight",
    ]
    assert collapsed(experts[1:]) == [
        "unexpected layers.{1-2}.experts.{0-7}.w1.weight (15 tensors)"
    ]


# --- Which file counts -----------------------------------------------------------------------


def test_a_single_file_counts_before_an_index(tmp_path):
    params = write_model(tmp_path / "a")
    stale = {name: 0 * value for name, value in read_tensors(tmp_path / "a").items()}
    write_shards(tmp_path / "a", stale)
    _, read = kvjax.load(tmp_path / "a", dtype="float32")
    assert jax.tree.all(jax.tree.map(np.array_equal, params, read))


@pytest.mark.parity
def test_transformers_reads_the_single_file(tmp_path):
    write_model(tmp_path / "a")
    want = our_logits(tmp_path / "a")
    write_shards(tmp_path / "a", {n: 0 * v for n, v in read_tensors(tmp_path / "a").items()})
    np.testing.assert_allclose(torch_logits(tmp_path / "a"), want, atol=2e-4, rtol=0)


@pytest.mark.parametrize("right", ["1.safetensors", "2.safetensors"])
def test_a_tensor_comes_from_the_shard_that_the_index_names(tmp_path, right):
    params = write_model(tmp_path / "a")
    tensors = read_tensors(tmp_path / "a")
    (tmp_path / "a" / SINGLE).unlink()
    norm = "model.norm.weight"
    wrong = {HEAD: 0 * tensors[HEAD], norm: tensors.pop(norm)}
    first, second = (tensors, wrong) if right == "1.safetensors" else (wrong, tensors)
    write_shards(tmp_path / "a", first, second, **{HEAD: right})
    _, read = kvjax.load(tmp_path / "a", dtype="float32")
    np.testing.assert_array_equal(read["lm_head"], params["lm_head"])


def test_shards_beside_the_index_do_not_count(tmp_path):
    params = write_model(tmp_path / "a")
    tensors = read_tensors(tmp_path / "a")
    (tmp_path / "a" / SINGLE).unlink()
    write_shards(tmp_path / "a", tensors)
    write_tensors(tmp_path / "a" / "model-00002-of-00002.safetensors", {HEAD: 0 * tensors[HEAD]})
    _, read = kvjax.load(tmp_path / "a", dtype="float32")
    np.testing.assert_array_equal(read["lm_head"], params["lm_head"])


def test_a_tensor_in_two_shards_that_the_index_does_not_name(tmp_path):
    write_model(tmp_path / "a")
    tensors = read_tensors(tmp_path / "a")
    (tmp_path / "a" / SINGLE).unlink()
    write_shards(tmp_path / "a", tensors, {HEAD: tensors[HEAD], "model.norm.weight": np.ones(16)})
    path = tmp_path / "a" / INDEX
    index = json.loads(path.read_text())
    index["weight_map"] = {"model.norm.weight": "2.safetensors", EMBEDDING: "1.safetensors"}
    path.write_text(json.dumps(index))
    assert f"{INDEX} has no {HEAD}, which is in several shards" in refusal(tmp_path / "a")


@pytest.mark.parametrize(
    ("file", "shown"),
    [
        ("../a.safetensors", "'../a.safetensors'"),
        ("/tmp/a.safetensors", "'/tmp/a.safetensors'"),
        ("x/../../a.safetensors", "'x/../../a.safetensors'"),
        ("C:\\a.safetensors", r"'C:\\a.safetensors'"),
        (3, "3"),
        (None, "None"),
        (["1.safetensors"], "['1.safetensors']"),
        ("", "''"),
    ],
)
def test_an_index_that_names_no_file_of_the_directory(tmp_path, file, shown):
    write_model(tmp_path / "a")
    tensors = read_tensors(tmp_path / "a")
    (tmp_path / "a" / SINGLE).rename(tmp_path / "a.safetensors")
    write_shards(tmp_path / "a", tensors, **{HEAD: file})
    line = f"{INDEX}: {HEAD} is in {shown}, expected a file in the directory"
    assert refusal(tmp_path / "a") == line


@pytest.mark.parametrize("content", ['{"weight_map": ["a"]}', "{}", '{"weight_map": "a"}'])
def test_an_index_without_a_weight_map(tmp_path, content):
    write_model(tmp_path / "a")
    (tmp_path / "a" / SINGLE).unlink()
    (tmp_path / "a" / INDEX).write_text(content)
    assert re.search(r"json: weight_map is .*, expected an object$", refusal(tmp_path / "a"))


# --- Leftovers of a save that was stopped ----------------------------------------------------


@pytest.mark.parametrize("layout", ["hf", "native"])
@pytest.mark.parametrize(
    "left", [INDEX, SINGLE, "model-00001-of-00002.safetensors", "params/layers_0/x"]
)
def test_leftovers_are_refused_and_kept(tmp_path, layout, left):
    (tmp_path / "a" / left).parent.mkdir(parents=True)
    (tmp_path / "a" / left).write_text("of the user")
    model = Transformer(config_from_hf(RAW))
    with pytest.raises(ValueError) as error:
        kvjax.save(model, random_params(model), tmp_path / "a", layout=layout)
    name = left.partition("/")[0]
    assert str(error.value) == (
        f"{tmp_path / 'a'} holds weights without a config ({name}): remove them, or save to "
        "another directory"
    )
    assert [path.name for path in (tmp_path / "a").iterdir()] == [name]
    assert (tmp_path / "a" / left).read_text() == "of the user"


def test_other_files_in_the_directory_do_not_matter(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "README.md").write_text("notes")
    write_model(tmp_path / "a")
    assert kvjax.load(tmp_path / "a")[0].config.vocab_size == 40


# --- Files and dtypes that hold no weights ----------------------------------------------------

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 16060617592\n"


def test_git_lfs_pointers_in_place_of_weights(tmp_path):
    write_model(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a" / SINGLE).write_text(POINTER)
    assert refusal(tmp_path / "a") == (
        f"{SINGLE} is a git-lfs pointer, not the file itself: run `git lfs pull` in its repository"
    )
    tensors = read_tensors(tmp_path / "b")
    (tmp_path / "b" / SINGLE).unlink()
    write_shards(tmp_path / "b", tensors)
    (tmp_path / "b" / "1.safetensors").write_text(POINTER)
    assert refusal(tmp_path / "b").startswith("1.safetensors is a git-lfs pointer")
    (tmp_path / "b" / INDEX).write_text(POINTER)
    assert "index.json is a git-lfs pointer, not the file itself" in refusal(tmp_path / "b")


@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int32", "int64", "uint16", "bool", "float8_e4m3fn", "float8_e5m2"]
)
def test_dtypes_that_are_no_weights(tmp_path, dtype):
    def change(tensors):
        tensors["model.norm.weight"] = np.ones(16).astype(jnp.dtype(dtype))
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.int64)

    write_model(tmp_path / "a", change)
    assert refusal(tmp_path / "a") == (
        f"model.norm.weight holds {dtype}, expected one of float64, float32, float16, bfloat16"
    )


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_dtypes_that_are_weights(tmp_path, dtype):
    def change(tensors):
        tensors["model.norm.weight"] = np.full(16, 1.5).astype(jnp.dtype(dtype))

    write_model(tmp_path / "a", change)
    _, params = kvjax.load(tmp_path / "a", dtype="float32")
    np.testing.assert_array_equal(params["final_norm"], np.full(16, 1.5, np.float32))
