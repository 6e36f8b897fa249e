"""load and save: round trips, lazy reading, and one clear line for every kind of damage."""

import json
import re
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from llama_toy import TINY
from toys import random_params

import kvjax
from kvjax.checkpoint_files import (
    DTYPES,
    Checkpoint,
    NewTensor,
    map_file,
    read_header,
    scan,
    write_file,
)
from kvjax.config import EqualCacheConfig
from kvjax.hf import default_dtype, open_params, weights
from kvjax.hf.config import config_from_hf
from kvjax.nn import Transformer

RAW = {**TINY, "eos_token_id": 2, "torch_dtype": "float32"}
FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "gemma2": {"head_dim": 8},
    "olmo2": {},
    "phi3": {},
    "mixtral": {"num_local_experts": 3},
    "qwen3_moe": {
        "head_dim": 4,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "mlp_only_layers": [0],
    },
    "deepseek_v3": {
        "first_k_dense_replace": 2,
        "q_lora_rank": 6,
        "kv_lora_rank": 10,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        "attention_bias": True,
    },
}


def toy(**changes):
    model = Transformer(config_from_hf({**RAW, **changes}))
    return model, random_params(model)


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)


@pytest.fixture
def saved(tmp_path):
    """A llama in the hf layout, and its directory."""
    model, params = toy()
    kvjax.save(model, params, tmp_path / "llama", layout="hf")
    return tmp_path / "llama", model, params


def rewrite(directory, change):
    """Applies `change` to the dict of all tensors of a single-file checkpoint."""
    path = directory / "model.safetensors"
    checkpoint = scan(directory)
    tensors = {name: np.array(checkpoint.open(name)) for name in checkpoint.tensors}
    change(tensors)
    path.unlink()
    write_tensors(path, tensors)


def write_tensors(path, values):
    write_file(path, [NewTensor(n, v.dtype, v.shape, lambda v=v: v) for n, v in values.items()])


# --- Round trips -----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["hf", "native"])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(tmp_path, family, layout):
    model, params = toy(model_type=family, **FAMILIES[family])
    kvjax.save(model, params, tmp_path / "a", layout=layout)
    again, read = kvjax.load(tmp_path / "a", dtype="float32")
    assert again == model
    assert equal(params, read)


def test_files_are_byte_equal_after_a_round_trip(saved, tmp_path):
    directory, *_ = saved
    (directory / "config.json").write_text(json.dumps(RAW) + "  \n")
    kvjax.save(*kvjax.load(directory, dtype="float32"), tmp_path / "b", layout="hf")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "b" / name).read_bytes() == (directory / name).read_bytes()


def test_another_dtype_is_written_to_the_config(saved, tmp_path):
    directory, _, params = saved
    model, half = kvjax.load(directory, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half)} == {"bfloat16"}
    assert equal(half, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    kvjax.save(model, half, tmp_path / "b", layout="hf")
    raw = json.loads((tmp_path / "b" / "config.json").read_text())
    assert raw == {**RAW, "torch_dtype": "bfloat16"}
    stored = read_header(tmp_path / "b" / "model.safetensors")
    assert {tensor.dtype.name for tensor in stored.values()} == {"bfloat16"}
    assert equal(half, kvjax.load(tmp_path / "b", dtype="bfloat16")[1])


def test_large_checkpoints_are_split(tmp_path):
    model, params = toy()
    kvjax.save(model, params, tmp_path / "a", layout="hf", max_shard_bytes=6000)
    shards = sorted(path.name for path in (tmp_path / "a").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(params))
    assert sorted(set(index["weight_map"].values())) == shards
    assert equal(params, kvjax.load(tmp_path / "a", dtype="float32")[1])


def test_fused_experts_are_read_as_well(tmp_path):
    """transformers 5 keeps the experts of a layer in one tensor, gate and up together."""
    model, params = toy(model_type="mixtral", **FAMILIES["mixtral"])
    kvjax.save(model, params, tmp_path / "a", layout="hf")

    def fuse(tensors):
        for i in range(2):
            old, new = f"model.layers.{i}.block_sparse_moe.", f"model.layers.{i}.mlp."
            w1, w3, w2 = (
                np.stack([tensors.pop(f"{old}experts.{e}.{w}.weight") for e in range(3)])
                for w in ("w1", "w3", "w2")
            )
            tensors[f"{new}experts.gate_up_proj"] = np.concatenate([w1, w3], axis=1)
            tensors[f"{new}experts.down_proj"] = w2
            tensors[f"{new}gate.weight"] = tensors.pop(f"{old}gate.weight")

    rewrite(tmp_path / "a", fuse)
    assert equal(params, kvjax.load(tmp_path / "a", dtype="float32")[1])


def test_buffers_and_the_second_copy_of_tied_embeddings_are_ignored(tmp_path):
    model, params = toy(tie_word_embeddings=True)
    kvjax.save(model, params, tmp_path / "a", layout="hf")

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        name = "model.layers.0.self_attn.rotary_emb.inv_freq"
        tensors[name] = np.ones(2, np.float32)

    rewrite(tmp_path / "a", add)
    assert equal(params, kvjax.load(tmp_path / "a", dtype="float32")[1])


def test_native_keeps_converted_models(tmp_path):
    model, _ = toy()
    converted = Transformer(
        model.config.with_attention(
            tuple(EqualCacheConfig(x.attention, 1, 8, 8) for x in model.config.layers)
        )
    )
    params = random_params(converted)
    kvjax.save(converted, params, tmp_path / "a")
    again, read = kvjax.load(tmp_path / "a", dtype="float32")
    assert again == converted
    assert equal(params, read)


def test_eos_ids_of_the_generation_config_are_kept(saved, tmp_path):
    directory, *_ = saved
    (directory / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    model, params = kvjax.load(directory)
    kvjax.save(model, params, tmp_path / "b", layout="hf")
    assert kvjax.load(tmp_path / "b")[0].config.eos_ids == (5, 6)


# --- Lazy reading ----------------------------------------------------------------------------


def test_no_second_copy_on_the_host(tmp_path):
    """Numpy's allocations stay at one copy of the parameters plus a few tensors."""
    sizes = {"vocab_size": 2000, "hidden_size": 128, "intermediate_size": 512}
    model = Transformer(config_from_hf({**RAW, **sizes, "num_hidden_layers": 6}))
    params = random_params(model, dtype=np.float32)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    kvjax.save(model, params, tmp_path / "a", layout="hf")
    tracemalloc.start()
    kvjax.load(tmp_path / "a", dtype="float32")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total > 5 * largest
    assert peak < total + 2 * largest


# --- Damage ----------------------------------------------------------------------------------


def test_one_error_lists_every_tensor(saved):
    def damage(tensors):
        del tensors["model.norm.weight"]
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.2.mlp.up_proj.weight"] = np.ones((24, 16), np.float32)
        tensors["lm_head.weight"] = np.ones((41, 16), np.float32)

    rewrite(saved[0], damage)
    with pytest.raises(ValueError) as error:
        kvjax.load(saved[0])
    assert str(error.value).splitlines() == [
        f"{saved[0]}: {line}"
        for line in (
            "missing model.norm.weight",
            "lm_head.weight has shape (41, 16), expected (40, 16)",
            "missing model.layers.1.mlp.up_proj.weight",
            "unexpected model.layers.2.mlp.up_proj.weight",
        )
    ]


def test_truncated_file(saved):
    path = saved[0] / "model.safetensors"
    data = path.read_bytes()
    for size, reason in ((len(data) - 1, f"expected {len(data)}"), (100, "within the header")):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=f"model.safetensors is truncated: .*{reason}"):
            kvjax.load(saved[0])
    path.write_bytes(b"\x05" + 7 * b"\0" + b"hello")
    with pytest.raises(ValueError, match=r"model.safetensors is not a safetensors file"):
        kvjax.load(saved[0])


def test_missing_and_truncated_shards(tmp_path):
    model, params = toy()
    directory = tmp_path / "a"
    kvjax.save(model, params, directory, layout="hf", max_shard_bytes=6000)
    _, second, third, *_ = sorted(directory.glob("*.safetensors"))
    count = len(read_header(second))
    second.unlink()
    third.write_bytes(third.read_bytes()[:-4])
    with pytest.raises(ValueError) as error:
        kvjax.load(directory)
    lines = str(error.value).splitlines()
    index = directory / "model.safetensors.index.json"
    assert lines[0] == f"{index}: missing shard {second.name} ({count} tensors)"
    assert lines[1].startswith(f"{third} is truncated: got ")
    assert len(lines) == 2  # the tensors in there are not listed one by one


def test_index_that_promises_what_no_file_holds(tmp_path):
    model, params = toy()
    kvjax.save(model, params, tmp_path / "a", layout="hf", max_shard_bytes=6000)
    path = tmp_path / "a" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    file = index["weight_map"]["model.norm.weight"]
    index["weight_map"]["model.extra"] = file
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=re.escape(f"{path} expects model.extra in {file}")):
        kvjax.load(tmp_path / "a")
    path.write_text("{}")
    with pytest.raises(ValueError, match="weight_map is missing, expected an object"):
        kvjax.load(tmp_path / "a")


def test_damaged_native_directories(tmp_path):
    model, params = toy()
    kvjax.save(model, params, tmp_path / "a")
    path = tmp_path / "a" / "kvjax.json"
    text = path.read_text()
    content = json.loads(text)
    content["model"]["vocab_size"] = 41
    content["model"]["tie_embeddings"] = True
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError) as error:
        kvjax.load(tmp_path / "a")
    assert str(error.value) == (
        f"{tmp_path / 'a'}: embedding has shape (40, 16), expected (41, 16)\n"
        f"{tmp_path / 'a'}: unexpected lm_head"
    )
    for damaged, message in (
        (text.replace('"MLPConfig"', '"Magic"'), "unknown part 'Magic'"),
        (text.replace('"version": 2', '"version": 9'), "version is 9, expected 2"),
        (text[:-9], "is not JSON"),
    ):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=message):
            kvjax.load(tmp_path / "a")


# --- What cannot be loaded or saved ----------------------------------------------------------


def test_paths_that_hold_no_model(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"no file at .*config\.json"):
        kvjax.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    with pytest.raises(ValueError, match=r"has neither model\.safetensors nor"):
        kvjax.load(tmp_path)
    with pytest.raises(ValueError, match="is a file, expected a directory"):
        kvjax.load(tmp_path / "config.json")
    with pytest.raises(ValueError, match="is neither a directory nor a hub id"):
        kvjax.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"nobody/nothing is not a directory, .* is unreachable"):
        kvjax.load("nobody/nothing")
    with pytest.raises(ValueError, match="no builtin model 'nothing', expected one of"):
        kvjax.load("builtin:nothing")


def test_builtin_names(tmp_path, monkeypatch):
    model, params = toy()
    kvjax.save(model, params, tmp_path / "tiny")
    monkeypatch.setattr("kvjax.hf.source.BUILTIN_DIRECTORY", tmp_path)
    assert kvjax.load("builtin:tiny")[0] == model
    with pytest.raises(ValueError, match="no builtin model 'huge', expected one of tiny"):
        kvjax.load("builtin:huge")


@pytest.mark.parametrize(("backend", "dtype"), [("cpu", "float32"), ("tpu", "bfloat16")])
def test_the_dtype_where_none_is_named(saved, monkeypatch, backend, dtype):
    assert default_dtype("gpu") == "bfloat16" and default_dtype("cpu") == "float32"
    monkeypatch.setattr("jax.default_backend", lambda: backend)
    assert default_dtype() == dtype
    for params in (kvjax.load(saved[0])[1], open_params(saved[0])["layers_0"]):
        assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {dtype}


@pytest.mark.parametrize("dtype", ["int8", "float12", "complex64"])
def test_dtypes_that_no_weights_have(saved, dtype):
    with pytest.raises(ValueError, match="expected one like bfloat16"):
        kvjax.load(saved[0], dtype=dtype)


def test_models_that_the_hf_layout_cannot_express(tmp_path):
    model, params = toy()
    other = model.config.with_attention(
        tuple(EqualCacheConfig(x.attention, 1, 8, 8) for x in model.config.layers)
    )
    converted = Transformer(other)
    with pytest.raises(ValueError, match=r"with EqualCacheConfig: .*; use layout='native'"):
        kvjax.save(converted, random_params(converted), tmp_path / "a", layout="hf")
    with pytest.raises(ValueError, match="layout is 'gguf', expected one of native, hf"):
        kvjax.save(model, params, tmp_path / "a", layout="gguf")
    assert not (tmp_path / "a").exists()


def test_nothing_is_overwritten(saved):
    directory, model, params = saved
    for layout in ("hf", "native"):
        with pytest.raises(ValueError, match="already holds a checkpoint"):
            kvjax.save(model, params, directory, layout=layout)


# --- The file format -------------------------------------------------------------------------


def test_safetensors_reads_what_we_write_and_we_read_what_it_writes(tmp_path):
    from safetensors import numpy as reference

    values = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.ones((0, 3), np.float16),
        "c": np.array(5, np.int64),
    }
    write_file(
        tmp_path / "ours",
        [NewTensor(n, v.dtype, v.shape, lambda v=v: v) for n, v in values.items()],
    )
    reference.save_file(values, tmp_path / "theirs")
    for path in (tmp_path / "ours", tmp_path / "theirs"):
        header, loaded = read_header(path), reference.load_file(path)
        assert header.keys() == loaded.keys() == values.keys()
        for name, value in values.items():
            np.testing.assert_array_equal(header[name].view(map_file(path)), value)
            np.testing.assert_array_equal(loaded[name], value)


def test_reading_is_lazy(saved):
    """Opening a tensor maps it; nothing is copied before it is indexed."""
    tensor = scan(saved[0]).open("lm_head.weight")
    assert not tensor.flags.owndata and not tensor.flags.writeable
    assert set(DTYPES) >= {"F32", "F16", "BF16"}


def test_released_pages_are_read_again(saved):
    checkpoint = scan(saved[0])
    view = checkpoint.open("lm_head.weight")
    before = view.copy()
    if sys.platform == "linux":
        assert resident_kilobytes(saved[0] / "model.safetensors") > 0
    checkpoint.release()
    if sys.platform == "linux":
        assert resident_kilobytes(saved[0] / "model.safetensors") == 0
    np.testing.assert_array_equal(view, before)


@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_are_read_in_pieces(tmp_path, monkeypatch, family, dtype):
    model, params = toy(model_type=family, **FAMILIES[family])
    kvjax.save(model, params, tmp_path / "model", layout="hf", max_shard_bytes=4_000)
    monkeypatch.setattr(weights, "PIECE_BYTES", 200)
    released = []
    monkeypatch.setattr(Checkpoint, "release", lambda self: released.append(self))
    _, loaded = kvjax.load(tmp_path / "model", dtype=dtype)
    assert equal(loaded, jax.tree.map(lambda leaf: leaf.astype(dtype), params))
    assert len(released) > 2 * len(jax.tree.leaves(params))


def resident_kilobytes(path):
    """Pages of a mapped file that this process holds, by the kernel's own account."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(path.resolve()))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total
