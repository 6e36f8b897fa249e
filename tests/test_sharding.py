"""Parameters on a mesh of eight fake devices: where they lie, and the same logits."""

import contextlib

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from toys import random_params

import kvjax
from kvjax.config import GQAConfig, LayerConfig, MLPConfig, ModelConfig, MoEConfig, RopeConfig
from kvjax.hf.config import config_from_hf
from kvjax.mesh import automatic
from kvjax.nn import Transformer
from kvjax.sharding import batch_sharding, make_mesh, param_shardings, parse_mesh, place_params

RAW = {
    "model_type": "mixtral",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_local_experts": 2,
    "vocab_size": 64,
}


def mesh(count):
    if len(jax.devices()) < count:
        pytest.skip(f"needs {count} devices, there are {len(jax.devices())}")
    return Mesh(np.array(jax.devices()[:count]), ("model",))


def test_mesh_of_named_sizes():
    devices = jax.devices()[:8]
    if len(devices) < 8:
        pytest.skip("needs 8 devices")
    made = make_mesh(parse_mesh("data=2, tensor=2,fsdp=-1"), devices)
    assert dict(made.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert batch_sharding(made).spec == PartitionSpec(("data", "fsdp"))
    assert dict(make_mesh({"fsdp": 4}, devices[:4]).shape) == {"data": 1, "fsdp": 4, "tensor": 1}
    with pytest.raises(ValueError, match=r"got mesh axes \['model'\], expected some of"):
        make_mesh({"model": 8}, devices)
    with pytest.raises(ValueError, match=r"data=3, fsdp=1, tensor=1, expected a product of 8"):
        make_mesh({"data": 3}, devices)
    with pytest.raises(ValueError, match="expected a form like data=1"):
        parse_mesh("data:2")
    for text in ("data=0", "data=0,fsdp=-1", "tensor=-2", "data=nan", "data=2,data=4"):
        with pytest.raises(ValueError, match="expected a form like"):
            parse_mesh(text)


def test_fsdp_splits_what_tensor_leaves():
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    model = Transformer(config_from_hf(RAW))
    both = make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    specs = jax.tree.map(lambda sharding: sharding.spec, param_shardings(model, both))
    assert specs["embedding"] == PartitionSpec("tensor", "fsdp")
    attention = specs["layers_0"]["attn"]
    assert attention["q"] == PartitionSpec("fsdp", "tensor")
    assert attention["o"] == PartitionSpec("tensor", None, "fsdp")
    assert specs["final_norm"] == PartitionSpec()


def test_specs():
    gqa = GQAConfig(8, 4, 4, 0.5, RopeConfig(4), qkv_bias=True)
    layers = (LayerConfig(gqa, MLPConfig(24)), LayerConfig(gqa, MoEConfig(3, 2, 16)))
    model = Transformer(ModelConfig("llama", 64, 16, layers))
    specs = jax.tree.map(lambda sharding: sharding.spec, param_shardings(model, mesh(8)))
    P = PartitionSpec
    assert specs["embedding"] == P("model")
    assert specs["lm_head"] == P(None, "model")
    assert specs["final_norm"] == P()
    attention = specs["layers_0"]["attn"]
    assert (attention["q"], attention["o"]) == (P(None, "model"), P("model"))
    assert attention["q_bias"] == P("model")
    assert attention["k"] == P()  # 4 KV heads on 8 devices
    assert specs["layers_0"]["mlp"]["gate"] == P(None, "model")
    assert specs["layers_0"]["mlp"]["down"] == P("model")
    # Three experts cannot be split over eight devices, but the width of each can.
    assert specs["layers_1"]["mlp"]["gate"] == P(None, None, "model")


@pytest.mark.parametrize("layout", ["hf", "native"])
def test_load_onto_a_mesh(tmp_path, layout):
    model = Transformer(config_from_hf(RAW))
    params = random_params(model)
    kvjax.save(model, params, tmp_path / "a", layout=layout)
    _, sharded = kvjax.load(tmp_path / "a", dtype="float32", mesh=mesh(4))
    q = sharded["layers_0"]["attn"]["q"]
    assert q.sharding.spec == PartitionSpec(None, "model")
    assert {shard.data.shape for shard in q.addressable_shards} == {(16, 2, 2)}
    gate = sharded["layers_0"]["mlp"]["gate"]
    assert {shard.data.shape for shard in gate.addressable_shards} == {(2, 16, 6)}
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(sharded), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_equal_logits(tmp_path):
    model = Transformer(config_from_hf(RAW))
    params = random_params(model)
    kvjax.save(model, params, tmp_path / "a", layout="hf")
    _, sharded = kvjax.load(tmp_path / "a", dtype="float32", mesh=mesh(4))
    tokens = np.arange(18, dtype=np.int32).reshape(2, 9)
    one, _ = jax.jit(model.apply)({"params": params}, tokens)
    many, _ = jax.jit(model.apply)({"params": sharded}, tokens)
    np.testing.assert_allclose(one, many, atol=1e-5)


@pytest.mark.parametrize("names", [("data", "tensor"), ("fsdp", "model"), ("data",)])
def test_a_mesh_as_jax_makes_it(tmp_path, names):
    """Its axes are explicit; a mesh without an axis for parameters has them on every device."""
    mesh(8)
    shape = (2, 4) if len(names) == 2 else (8,)
    made = jax.make_mesh(shape, names)
    model = Transformer(config_from_hf(RAW))
    params = random_params(model)
    kvjax.save(model, params, tmp_path / "a", layout="hf")
    _, sharded = kvjax.load(tmp_path / "a", dtype="float32", mesh=made)
    prompts = [[5, 6, 7, 8, 9], [1, 2]] * 4
    settings = {"max_new_tokens": 5, "eos_ids": ()}
    want = kvjax.generate(model, params, prompts, **settings).tokens
    assert kvjax.generate(model, sharded, prompts, **settings).tokens == want
    shardings = jax.tree.map(lambda x: NamedSharding(made, x.sharding.spec), sharded)
    placed = jax.device_put(params, shardings)  # as a user does it who knows nothing of kvjax
    assert AxisType.Explicit in jax.tree.leaves(placed)[0].sharding.mesh.axis_types
    assert kvjax.generate(model, placed, prompts, **settings).tokens == want
    policy = "snapkv:kv_size=4,observed=2"
    context = kvjax.compress(model, placed, prompts[0], policy)
    alone = kvjax.compress(model, params, prompts[0], policy)
    assert context.model == alone.model
    np.testing.assert_allclose(context.cache.pools[0].k, alone.cache.pools[0].k, atol=1e-5)


@pytest.mark.parametrize("where", ["arrays", "set_mesh"])
def test_explicit_axes_anywhere(where):
    """In tokens, in parameters and in `jax.set_mesh`: the numbers are those of one device."""
    mesh(8)
    made = jax.make_mesh((2, 4), ("data", "tensor"))
    model = Transformer(config_from_hf(RAW))
    params = random_params(model)
    tokens, prompts = np.arange(64, dtype=np.int32).reshape(4, 16), [[5, 6, 7]] * 8
    want = jax.jit(model.apply)({"params": params}, tokens)[0]
    alone = kvjax.transmla.calibrate(model, params, [tokens])
    placed = place_params(model, params, made)
    if where == "arrays":
        placed = jax.tree.map(
            lambda x: jax.device_put(x, NamedSharding(made, x.sharding.spec)), placed
        )
        tokens = jax.device_put(tokens, NamedSharding(made, PartitionSpec("data")))
    context = jax.set_mesh(made) if where == "set_mesh" else contextlib.nullcontext()
    with context:
        eager, _ = model.apply({"params": placed}, tokens)
        jitted, _ = jax.jit(model.apply)({"params": placed}, tokens)
        stats = kvjax.transmla.calibrate(model, placed, [np.asarray(tokens)])
        converted, _ = kvjax.transmla.convert(model, placed)
        generated = kvjax.generate(model, placed, prompts, max_new_tokens=3).tokens
    np.testing.assert_allclose(eager, want, atol=1e-5)
    np.testing.assert_allclose(jitted, want, atol=1e-5)
    np.testing.assert_allclose(stats.layers[0].kv_mean, alone.layers[0].kv_mean, atol=1e-5)
    assert converted.config.num_layers == model.config.num_layers
    assert generated == kvjax.generate(model, params, prompts, max_new_tokens=3).tokens


@pytest.mark.parametrize("value", ["data=8", {"data": 8}, 8])
def test_what_is_no_mesh(value):
    with pytest.raises(ValueError, match=r"mesh is .*, expected a jax.sharding.Mesh"):
        automatic(value)


def test_a_mesh_needs_an_axis_that_splits_parameters():
    model = Transformer(config_from_hf(RAW))
    wrong = Mesh(np.array(jax.devices()[:1]), ("x",))
    with pytest.raises(ValueError, match=r"mesh has axes \('x',\), expected some of .*'fsdp'"):
        param_shardings(model, wrong)
