"""GGUF files: every architecture, quantizations, split files, and errors in one line."""

import dataclasses
import json
import shutil

import gguf
import jax
import numpy as np
import pytest
from gguf_files import (
    CASES,
    SCALES,
    add_metadata,
    factor_tensors,
    folder_with,
    gguf_tensors,
    hf_tensors,
    raw_config,
    write,
)

import kvjax
from kvjax.hf import config_from_hf, read_model, stored_tensors
from kvjax.hf.gguf import header, rope
from kvjax.hf.layout import layouts, tensors
from kvjax.hf.weights import open_params
from kvjax.mesh import make_mesh

KEPT = {"hf_json": "{}", "source": ""}


def bare(config):
    """The configuration without the file that it came from."""
    return dataclasses.replace(config, **KEPT)


def by_hf_name(model, params):
    """The tensors of a Hugging Face checkpoint that holds these parameters."""
    flat = {
        tuple(str(key.key) for key in path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    shapes = {path: leaf.shape for path, leaf in flat.items()}
    found = {}
    for t in tensors(model.config, shapes, layouts(model.config)[0]):
        leaves = [flat[path] for path in t.params]
        found[t.name] = t.merge([x if t.expert is None else x[t.expert] for x in leaves])
    return found


@pytest.mark.parametrize("name", CASES)
def test_every_architecture(tmp_path, name):
    """The config and every weight are those of the Hugging Face model that the file was made of."""
    raw = raw_config(name)
    path = folder_with(tmp_path, raw)
    model, params = kvjax.load(path, dtype="float32")
    assert bare(model.config) == bare(config_from_hf(raw))
    want, got = hf_tensors(raw), by_hf_name(model, params)
    assert got.keys() == want.keys()
    for key, values in want.items():
        np.testing.assert_array_equal(got[key], values, err_msg=key)


def test_one_tensor_for_each_expert(tmp_path):
    """Files of 2023 name every expert."""
    raw = raw_config("mixtral")
    named, arch = hf_tensors(raw), "llama"
    writer = gguf.GGUFWriter(tmp_path / "old.gguf", arch)
    add_metadata(writer, raw)
    for name, values in gguf_tensors(raw, named, arch).items():
        base = name.removesuffix("_exps.weight")
        parts = {name: values}
        if base != name:
            parts = {f"{base}.{e}.weight": one for e, one in enumerate(values)}
        for part, one in parts.items():
            writer.add_tensor(part, one)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model, params = kvjax.load(tmp_path, dtype="float32")
    for key, values in by_hf_name(model, params).items():
        np.testing.assert_array_equal(values, named[key], err_msg=key)


WIDE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
KINDS = ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", *SCALES)


def test_every_quantization(tmp_path):
    """A layer of each kind; weights are the numbers that the gguf package gives, also in bf16."""
    raw = raw_config("qwen2", **WIDE, num_hidden_layers=len(KINDS))
    named, path = hf_tensors(raw), tmp_path / "model.gguf"

    def kind(name):
        words = name.split(".")
        return KINDS[int(words[1])] if words[0] == "blk" else "Q6_K"

    write(path, raw, named, kind)
    stored = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    dtypes = {"float32": np.float32, "bfloat16": jax.numpy.bfloat16}
    for dtype in dtypes:
        model, params = kvjax.load(path, dtype=dtype)
        want = {k: v.astype(dtypes[dtype]) for k, v in stored.items()}
        got = gguf_tensors(raw, by_hf_name(model, params), "qwen2")
        for name, values in want.items():
            np.testing.assert_array_equal(got[name], values, err_msg=name)
    found = {t.kind for t in stored_tensors(path).values()}
    assert found == {"F32", *KINDS}


def test_kept_one_tensor_at_a_time(tmp_path, monkeypatch):
    """Only the tensors of the part that is asked for become numbers."""
    from kvjax.hf.gguf import tensors as module

    raw = raw_config("qwen2")
    path = folder_with(tmp_path, raw, kinds=lambda name: "Q8_0")
    model, opened = read_model(path), []
    plain = module.dequantized
    monkeypatch.setattr(
        module, "dequantized", lambda stored, t: (opened.append(t.shape), plain(stored, t))[1]
    )
    params = module.open_params(model, path, np.dtype("float32"))
    assert not opened
    params["lm_head"]
    assert opened == [(96, 64)]


def test_on_a_mesh(tmp_path):
    raw = raw_config("mixtral", vocab_size=96)
    path = folder_with(tmp_path, raw, kinds=lambda name: "Q8_0")
    mesh = make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    sharded, whole = (kvjax.load(path, "float32", mesh=m)[1] for m in (mesh, None))
    assert len(sharded["layers_0"]["mlp"]["up"].devices()) == 4
    jax.tree.map(np.testing.assert_array_equal, sharded, whole)


def test_split_files_are_one_model(tmp_path):
    raw = raw_config("qwen2")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    want = kvjax.load(folder_with(whole, raw), dtype="float32")[1]
    folder_with(parts, raw, pieces=12)
    names = sorted(file.name for file in parts.iterdir())
    assert names[0] == "model-00001-of-00003.gguf" and len(names) == 3
    for path in (parts, parts / names[0], parts / names[2]):
        model, params = kvjax.load(path, dtype="float32")
        jax.tree.map(np.testing.assert_array_equal, params, want)
    assert model.config.source.endswith(names[0])
    (parts / names[1]).rename(parts / "other.bin")
    with pytest.raises(ValueError, match=f"has no {names[1]} of the 3 pieces of a model"):
        kvjax.load(parts / names[0])
    shutil.copy(parts / names[0], parts / names[1])
    with pytest.raises(ValueError, match="is piece 1 of 3 by its header, expected 2 of 3"):
        kvjax.load(parts)
    shutil.copy(parts / names[0], tmp_path / "renamed.gguf")
    with pytest.raises(ValueError, match="is piece 1 of 3 by its header, expected 1 of 1"):
        kvjax.load(tmp_path / "renamed.gguf")


def test_which_file_of_a_folder(tmp_path):
    raw = raw_config("llama")
    path = folder_with(tmp_path, raw)
    shutil.copy(path, tmp_path / "mmproj-model.gguf")  # an image encoder
    assert read_model(tmp_path).config.source == str(tmp_path)
    shutil.copy(path, tmp_path / "b.gguf")
    line = "has 2 GGUF models, expected one: give the path of one of them, .*b.gguf, model.gguf"
    with pytest.raises(ValueError, match=line):
        kvjax.load(tmp_path)
    # Safetensors come first, whatever else the folder has.
    kvjax.save(*kvjax.load(path), tmp_path / "hf", layout="hf")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tmp_path / "hf" / name, tmp_path)
    assert read_model(tmp_path).config.hf_json == (tmp_path / "config.json").read_text()


def test_saved_as_hugging_face_files(tmp_path):
    """The saved folder has the model of the file, and its config.json reads as the metadata."""
    raw = raw_config("gemma3_text")
    model, params = kvjax.load(folder_with(tmp_path, raw), dtype="float32")
    kvjax.save(model, params, tmp_path / "hf", layout="hf")
    again = read_model(tmp_path / "hf")
    assert bare(again.config) == bare(model.config)
    assert json.loads(again.config.hf_json)["architectures"] == ["Gemma3ForCausalLM"]
    read = open_params(again, tmp_path / "hf", np.dtype("float32"))
    jax.tree.map(np.testing.assert_array_equal, dict(read), params)


def test_ids_that_end_an_answer(tmp_path):
    words = ["<s>", "a", "<|endoftext|>", "</s>", "<|im_end|>"]

    def extra(writer):
        writer.add_token_list(words)
        writer.add_eot_token_id(5)

    path = folder_with(tmp_path, raw_config("qwen2", eos_token_id=4), extra=extra)
    config = read_model(path).config
    assert config.eos_ids == (4, 5, 2) and config.bos_id == 1


@pytest.mark.parametrize("factor", (8.0, 32.0))
def test_llama3_settings_from_factors(factor):
    """Of Llama 3.1 (head width 128) and Llama 3.2 (64), both rounded to float32 in the file."""
    settings = CASES["llama3"]["rope_scaling"] | {"factor": factor}
    for width in (64, 128):
        raw = {"rope_scaling": settings, "rope_theta": 5e5, "head_dim": width}
        factors = factor_tensors(raw)["rope_freqs.weight"].astype(np.float64)
        assert rope.as_llama3(factors, 5e5 ** -(np.arange(0, width, 2) / width)) == settings


def test_a_part_of_a_head_rotates():
    """transformers and kvjax truncate the product; 30 / 44 · 44 is below 30 in floating point."""
    for head_dim in range(2, 257, 2):
        for width in range(2, head_dim + 1, 2):
            assert int(head_dim * rope._share(width, head_dim)) == width


def test_other_factors_are_kept(tmp_path):
    """Factors of no known rule: the frequencies are divided by them, whatever the length."""
    raw = raw_config("llama", head_dim=8)
    named = hf_tensors(raw)
    raw["rope_scaling"] = {"rope_type": "longrope", "short_factor": 0, "long_factor": 0}
    factors = np.float32([1, 3, 2, 5])

    def extra(writer):
        writer.add_tensor("rope_freqs.weight", factors)

    raw["rope_scaling"] = None
    write(tmp_path / "m.gguf", raw, named, extra=extra)
    scaling = read_model(tmp_path).config.layers[0].attention.rope.scaling
    assert scaling.short_factor == scaling.long_factor == (1.0, 3.0, 2.0, 5.0)
    assert scaling.attention_factor == 1.0


# --- Errors --------------------------------------------------------------------------------------


def refused(path):
    """The error with which a file is refused: one line for each problem."""
    with pytest.raises(ValueError) as caught:
        kvjax.load(path)
    return str(caught.value)


def test_damaged_files(tmp_path):
    path = folder_with(tmp_path, raw_config("llama"))
    content = path.read_bytes()
    path.write_bytes(content[:-40])
    got, want = len(content) - 40, len(content)
    assert f"is truncated: got {got} bytes, expected" in refused(path)
    assert want - 40 < int(refused(path).rsplit(" ", 1)[1]) <= want
    for length in (4, 20, 30, 100, 900):
        path.write_bytes(content[:length])
        assert f"is truncated: its {length} bytes end within the header" in refused(path)
    path.write_bytes(content[:4] + b"\x01" + content[5:])
    assert "is damaged: got version 1, expected version 2 or 3" in refused(path)
    path.write_bytes(content[:4] + b"\x00\x00\x00\x03" + content[8:])
    assert "is damaged: got a file for big-endian machines" in refused(path)
    path.write_bytes(b"GGML" + content[4:])
    assert "is not a GGUF file" in refused(path)
    path.write_bytes(b"")
    assert "is not a GGUF file" in refused(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "is a git-lfs pointer" in refused(path)
    assert f"{tmp_path} has no none.gguf" in refused(tmp_path / "none.gguf")
    (tmp_path / "a.bin").write_bytes(content)
    assert "is a file, expected a directory or a .gguf file" in refused(tmp_path / "a.bin")


def test_any_damaged_byte_is_one_line_or_no_error(tmp_path):
    """Bytes of the header at random: an error is one line, and reading ends."""
    path = folder_with(tmp_path, raw_config("llama", num_hidden_layers=1))
    content, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(150):
        spoilt = bytearray(content)
        spoilt[rng.integers(4, 3000)] = rng.integers(0, 256)
        path.write_bytes(spoilt)
        try:
            header.read_header(path)
            read_model(path)
        except ValueError as error:
            assert "\n" not in str(error)


def test_tensors_that_do_not_fit(tmp_path):
    raw = raw_config("qwen2")
    names = [f"blk.{i}.attn_k.weight" for i in (0, 1)]
    path = folder_with(tmp_path, raw, skip=(*names, "output_norm.weight"))
    line = refused(path)
    assert f"{path}: missing output_norm.weight" in line and f"missing {names[0]}" in line

    def more(writer):
        writer.add_tensor("blk.0.attn_sinks.weight", np.zeros(4, np.float32))

    folder_with(tmp_path, raw, extra=more)
    assert "unexpected blk.0.attn_sinks.weight" in refused(path)
    named = hf_tensors(raw)
    write(path, raw | {"intermediate_size": 128}, named)
    assert "blk.0.ffn_up.weight has shape (96, 64), expected (128, 64)" in refused(path)
    folder_with(tmp_path, raw, skip=("token_embd.weight",))
    assert "missing token_embd.weight" in refused(path)


def test_quantizations_that_cannot_be_read(tmp_path):
    raw, kind = raw_config("qwen2"), gguf.GGMLQuantizationType.Q8_1
    size = gguf.GGML_QUANT_SIZES[kind][1]

    def extra(writer):
        writer.add_tensor("blk.0.ffn_up.weight", np.zeros((96, 2 * size), np.uint8), raw_dtype=kind)

    path = folder_with(tmp_path, raw, extra=extra, skip=("blk.0.ffn_up.weight",))
    line = f"{path}: blk.0.ffn_up.weight is quantized as Q8_1, which the gguf package"
    assert line in refused(path)
    assert "missing" not in refused(path)
    content = path.read_bytes()
    at = content.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + 4 + 2 * 8
    path.write_bytes(content[:at] + b"\xee\x00\x00\x00" + content[at + 4 :])
    assert "'blk.0.ffn_up.weight' has the quantization 238, which the gguf package" in refused(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "falcon"}, "general.architecture is 'falcon', expected one of gemma2, gemma3,"),
        ({"logit_scale": 2.0}, "qwen2.logit_scale is 2.0, expected 0.0 or 1.0 for qwen2"),
        ({"value_length": 8}, "keys have 16 numbers and values 8, expected as many"),
        ({"rope": "linear"}, "rope.scaling.type is 'linear', and there is no rope.scaling.factor"),
        ({"rope": "longrope"}, "there is no rope_factors_long.weight"),
        ({"heads": [2, 1]}, "qwen2.attention.head_count_kv differs between layers"),
        ({"layers": 10_001}, "qwen2.block_count is 10001, expected at most 10000"),
    ],
)
def test_models_that_kvjax_does_not_compute(tmp_path, changes, message):
    adders = {
        "arch": ("general.architecture", "add_architecture"),
        "logit_scale": (None, "add_logit_scale"),
        "value_length": ("qwen2.attention.value_length", "add_value_length"),
        "heads": ("qwen2.attention.head_count_kv", "add_head_count_kv"),
        "layers": ("qwen2.block_count", "add_block_count"),
        "rope": (None, "add_rope_scaling_type"),
    }

    def extra(writer):
        for name, value in changes.items():
            key, add = adders[name]
            writer.kv_data[0].pop(key, None)
            writer.arch = value if name == "arch" else writer.arch
            kind = gguf.RopeScalingType(value) if name == "rope" else value
            getattr(writer, add)(*([] if name == "arch" else [kind]))

    path = folder_with(tmp_path, raw_config("qwen2", rope_scaling=None), extra=extra)
    assert f"{path}: " in refused(path) and message in refused(path)


def test_missing_metadata(tmp_path):
    def extra(writer):
        writer.kv_data[0].pop("qwen2.block_count")

    path = folder_with(tmp_path, raw_config("qwen2"), extra=extra)
    assert "the metadata has no number for qwen2.block_count" in refused(path)
