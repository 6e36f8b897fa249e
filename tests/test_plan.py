"""What `kvjax plan` says, without a compiler for the devices it is about."""

import json
import math
import re
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import GQA, MLA, mesh_of_eight, toy

import kvjax
from kvjax.capacity.devices import Topology, device_bytes
from kvjax.capacity.plan import LONGEST, Footprint, Request, extrapolate, plan_capacity
from kvjax.capacity.programs import (
    Compiler,
    Program,
    block_step,
    count_collectives,
    fused_step,
    heap_bytes,
    prefill_bytes,
)
from kvjax.capacity.variants import Served, Variant, Workload, default_mesh, shallower
from kvjax.cli import main
from kvjax.hf import read_shape
from kvjax.nn.transformer import block_kinds
from kvjax.policies.budgets import HeadImportance, Uniform
from kvjax.policies.importance import HeadScores
from kvjax.policies.named import parse_policy
from kvjax.policies.need import MeasuredNeed, NeedCurves
from kvjax.policies.policy import Compress
from kvjax.policies.scorers import ObservationWindow
from kvjax.prefilling import OBSERVED, embed_chunks, read_layer
from kvjax.sharding import place_params

SHAPES = Path(__file__).parents[1] / "benchmarks" / "shapes"
GIB = 2**30


@pytest.mark.parametrize(
    "model, topology, tensor",
    [
        ("llama-3-8b", "v5e:4x4", 8),
        ("qwen2.5-7b", "v5p:2x2x4", 4),
        ("qwen2.5-72b", "v6e:4x4", 8),
        ("llama-3-70b", "v5e:4x4", 16),  # 8 KV heads, but eight chips cannot hold the weights
        ("llama-3-8b", "h200:1", 1),
    ],
)
def test_the_mesh_that_is_taken(model, topology, tensor):
    topology = Topology.parse(topology)
    mesh = default_mesh(read_shape(str(SHAPES / f"{model}.json")), topology, "bfloat16")
    assert mesh == {"data": topology.count // tensor, "tensor": tensor}


def test_bytes_of_a_device():
    """Weights and caches of Llama-3-8B over 2 × 8 devices, counted by hand."""
    model = read_shape(str(SHAPES / "llama-3-8b.json"))
    mesh = Topology.parse("v5p:2x2x4").abstract_mesh({"data": 2, "tensor": 8})
    layer = 4096 * (4096 + 2 * 1024 + 4096 + 3 * 14336)
    split = 2 * (32 * layer + 2 * 128256 * 4096) / 8
    norms = 2 * 65 * 4096

    def held(policy):
        size = Workload(32, 4096, 128)
        return Served.create(model, parse_policy(policy), size, mesh, "bfloat16").nbytes

    weights, caches = held("full")
    assert weights == split + norms
    whole_lengths = 4 * 16
    # 16 sequences, one KV head, 128 numbers, keys and values, 2 bytes; and a length a sequence.
    assert caches == 32 * 16 * ((4096 + 128) * 128 * 2 * 2 + 4) + whole_lengths
    _, fewer = held("full:entries=int8")
    channels = 2 * 128 * 2  # centre and size of each channel of the keys, 2 bytes each
    assert fewer == 32 * 16 * ((4096 + 128) * (128 + 4) * 2 + 4 + channels) + whole_lengths
    # Four groups of 32 numbers, and centre and size of each channel of the keys.
    _, fewest = held("full:entries=int4")
    assert fewest == 32 * 16 * ((4096 + 128) * (64 + 16) * 2 + 4 + 2 * 128 * 2) + whole_lengths
    # One pool for all layers: 32 · 512 rows are a bucket's size. Four tables and two lengths.
    _, pooled = held("snapkv:kv_size=512")
    rows = 32 * (512 + 128)
    assert pooled == 16 * (rows * 128 * 2 * 2 + 4 * 32 * 4 + 2 * 4) + whole_lengths


@pytest.mark.parametrize("kind, policy", [(GQA, "full"), (MLA, "full"), (GQA, "snapkv:kv_size=16")])
def test_shapes_are_those_of_real_programs(kind, policy):
    """Of caches, and of what they are compiled with: on eight devices that are here."""
    model, params = toy(kind, kind)
    mesh = mesh_of_eight("data=2,tensor=4")
    params = place_params(model, params, mesh)
    tokens, lengths = np.ones((4, 48), np.int32), np.full(4, 48, np.int32)
    _, cache = kvjax.prefill(model, params, tokens, lengths, policy=policy, max_new_tokens=8)
    served = Served.create(model, parse_policy(policy), Workload(4, 48, 8), mesh, "float32")
    assert jax.tree.map(shape_of, served.cache) == jax.tree.map(shape_of, cache)
    held = device_bytes(params), device_bytes(cache)
    assert served.nbytes == held
    compile = Compiler()
    step = fused_step(served)
    assert sum(held) - 64 < step.arguments < sum(held) + 64  # lengths, tokens, who has ended
    # The stream, a layer's prompt, and the temporaries of the largest program.
    x = embed_chunks(model.config, mesh, params["embedding"], tokens)
    stream, block = device_bytes(x), block_kinds(model.config)[0].block
    arrays = (block, params["layers_0"], None, x, lengths, lengths)
    _, prompt = read_layer(*arrays, observed=OBSERVED, mesh=mesh)
    reading = prefill_bytes(served, compile)
    (read,) = (call for key, call in compile.calls.items() if key[0] is read_layer)
    assert read.program.results == pytest.approx(device_bytes(prompt), abs=64)
    least = stream + 2 * read.program.results + read.program.temporaries
    most = max(call.program.temporaries + call.program.results for call in compile.calls.values())
    assert least <= reading <= stream + 2 * read.program.results + most


def shape_of(leaf):
    return leaf.shape, jnp.dtype(leaf.dtype)


def test_a_layer_has_two_all_reduces():
    model, mesh = toy(GQA, GQA, GQA)[0], mesh_of_eight("data=2,tensor=4")
    found = []
    for depth in (1, 3):
        shallow = shallower(Variant("", model, parse_policy("full")), depth)
        served = shallow.served(Workload(4, 48, 8), mesh, "float32")
        found.append(fused_step(served).collectives)
    assert found[1] - found[0] == Counter({"all-reduce": 4})
    assert found[0].total() <= 2 + 3
    step = block_step(served, Compiler())
    assert step.layer == Counter({"all-reduce": 2})
    assert step.outside.total() <= 3


def test_a_shallower_model_has_the_measurements_of_its_layers():
    """Budgets from importance, from need, and without measurements."""
    model, _ = toy(*[GQA] * 4)
    numbers = np.random.default_rng(0).random((4, 4, 3))
    curves = NeedCurves(np.asarray([0, 2, 99]), numbers, numbers)
    heads = HeadScores(np.repeat(numbers, 2, axis=1))
    importance = HeadImportance(1.2, heads)
    both = MeasuredNeed(curves, importance)
    for allocator in (importance, MeasuredNeed(curves), both, Uniform()):
        policy = Compress(allocator, ObservationWindow(), 20)
        shallow = shallower(Variant("", model, policy), 2)
        assert shallow.model.config.num_layers == 2
        assert shallow.policy.kept(shallow.model.config, 64).shape == (2, 4)
    kept = shallower(Variant("", model, Compress(MeasuredNeed(curves), ObservationWindow(), 20)), 2)
    np.testing.assert_array_equal(kept.policy.allocator.curves.rises, numbers[:2])


def test_layers_of_a_kind_are_compiled_once():
    mesh, counts = mesh_of_eight("data=2,tensor=4"), []
    for depth in (3, 6):
        model, _ = toy(*[GQA] * depth)
        variant, compile = Variant("", model, parse_policy("snapkv:kv_size=16")), Compiler()
        served = variant.served(Workload(4, 48, 8), mesh, "float32")
        prefill_bytes(served, compile)
        block_step(served, compile)
        functions = Counter(key[0] for key in compile.calls)
        counts.append(functions.total())
    assert counts[0] == counts[1] == len(functions)


def test_collectives_in_a_program():
    text = """
  %a = bf16[8] all-reduce-start(%x), channel_id=1, metadata={op_name="layers_0/out"}
  %b = bf16[8] all-reduce-done(%a)
  %c = bf16[8] all-gather(%x), channel_id=2, metadata={op_name="layers_0/attn"}
  %d = bf16[8] all-gather(%x), channel_id=2, metadata={op_name="layers_0/attn"}
  %e = bf16[8] all-gather(%x), channel_id=2, metadata={op_name="layers_1/attn"}
  %f = bf16[8] all-to-all(%x), channel_id=3
  %g = bf16[8] all-reduce(%x), channel_id=4, to_apply=%add
  %h = bf16[8] negate(%x), metadata={op_name="layers_1/attn"}
"""
    assert count_collectives(text) == Counter({"all-reduce": 2, "all-gather": 2, "all-to-all": 1})


def test_room_is_used_up():
    """One group of sequences more, or one token more, does not fit."""
    room = Footprint(
        4, 10 * GIB, fixed=1e6, per_token=2e4, decode=3e6, decode_more=2e5, prefill=1e4
    )
    usable = 15 * GIB
    batch = room.most_sequences(32768, usable)
    assert batch % 4 == 0 and room.needed(batch, 32768) <= usable
    assert room.needed(batch + 4, 32768) > usable
    longest = room.longest(8, usable)
    assert room.needed(8, longest) <= usable < room.needed(8, longest + 1)
    assert room.most_sequences(32768, 10 * GIB) == room.longest(8, 10 * GIB) == 0
    assert Footprint(1, 0, 1.0, 0.0).longest(1, 10) == LONGEST
    programs = [Program(100, 10, 0, Counter()), Program(140, 16, 0, Counter())]
    assert extrapolate(programs, (2, 4), 32, "arguments") == 100 + 30 * 20
    assert extrapolate(programs[::-1], (2, 4), 32, "temporaries") == 16


def shallow_shape(folder, name, layers):
    """A config.json with fewer layers."""
    raw = json.loads((SHAPES / f"{name}.json").read_text()) | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(raw))
    return str(folder / "config.json")


def test_the_heap_is_what_xla_wrote_of_it(tmp_path):
    """Of the default memory; VMEM and SMEM, as colors, do not count."""
    assert heap_bytes(tmp_path) is None
    of_a_tpu = """allocation 278: size 512, constant:
allocation 279: size 3555840, preallocated-temp:
 value: <1203 copy-start.16{} @0> (size=512,offset=3555328): (bf16[4096])
allocation 280: size 64, color 2, preallocated-temp:
allocation 282: size 109772800, color 1, preallocated-temp:
"""
    (tmp_path / "module_0000.jit_step.buffer-assignment.txt").write_text(of_a_tpu)
    assert heap_bytes(tmp_path) == 3555840
    of_a_gpu = "allocation 145: size 4572728, page 0, preallocated-temp:\n"
    (tmp_path / "module_0000.jit_step.buffer-assignment.txt").write_text(of_a_gpu)
    assert heap_bytes(tmp_path) == 4572728


@pytest.fixture
def no_compiler(monkeypatch):
    """As on a machine without one for these devices."""

    def devices(self):
        raise ValueError(f"cannot compile for {self.name}")

    monkeypatch.setattr(Topology, "devices", devices)


@pytest.mark.usefixtures("no_compiler")
def test_the_command(tmp_path, capsys):
    out = tmp_path / "plan.json"
    command = ["plan", shallow_shape(tmp_path, "llama-3-8b", 4), "--topology", "h200:8"]
    command += ["--json", str(out)]
    main([*command, "--context", "16384", "--batch", "8", "--policy", "snapkv:kv_size=1024"])
    report = json.loads(out.read_text())
    assert report["mesh"] == "data=1, fsdp=1, tensor=8" and report["check"] is None
    assert any("estimated, not compiled" in note for note in report["notes"])
    assert any("needs XLA_PYTHON_CLIENT_MEM_FRACTION=0.97" in note for note in report["notes"])
    assert any("made for 8192 tokens" in note for note in report["notes"])
    rows = {row["variant"]: row for row in report["rows"]}
    full, latent, snapkv = (rows[n] for n in ("full", "MLA 512 + 128", "snapkv:kv_size=1024"))
    assert full["cache"] == 4 * 8 * ((16384 + 128) * 512 + 4) + 4 * 8
    assert full["batch_factor"] == full["context_factor"] == 1.0
    assert full["collectives_layer"] is None
    assert 3 < latent["batch_factor"] < 3.3  # 2048 numbers a token against 640, weights the same
    assert snapkv["batch_factor"] > 12
    assert all(row["fits"] for row in report["rows"])
    assert "not compiled" in capsys.readouterr().out


@pytest.mark.usefixtures("no_compiler")
def test_more_devices_than_heads(tmp_path):
    out = tmp_path / "plan.json"
    command = [
        "plan",
        shallow_shape(tmp_path, "llama-3-70b", 2),
        "--topology",
        "h100:16",
        "--json",
        str(out),
    ]
    main([*command, "--mesh", "tensor=16", "--context", "8192"])
    report = json.loads(out.read_text())
    assert any("2 devices hold each" in note for note in report["notes"])
    assert report["rows"][0]["cache"] == 2 * ((8192 + 128) * 512 + 4) + 4
    assert math.isclose(report["usable_bytes"], 0.97 * 81_559 * 2**20)


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("shape, latent", [("qwen2.5-7b", (512, 128)), ("small", (144, 48))])
def test_default_latents(shape, latent, tmp_path):
    """512 + 128 numbers a token, or half of the cache where keys and values have no more."""
    path = Path(shallow_shape(tmp_path, "qwen2.5-7b", 2))
    if shape == "small":  # 3 KV heads of 64 have 384 numbers
        heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
        path.write_text(json.dumps(json.loads(path.read_text()) | heads))
    report = plan_capacity(Request(str(path), "h200:1", 512, 32))
    rank, rope = latent
    assert report["rows"][-1]["variant"] == f"MLA {rank} + {rope}"


@pytest.mark.parametrize(
    "change, message",
    [
        (["--topology", "v5e"], r"got topology 'v5e', expected KIND:SHAPE like v5e:4x4"),
        (["--topology", "tpu:4"], r"got topology 'tpu:4', expected KIND:SHAPE"),
        (["--mesh", "data=3"], r"got a mesh of 3 devices, expected 8 for h200:8"),
        (["--mesh", "tensor=8,data=1", "--latent", "64", "7"], r"got kv_rank 64 and rope_dim 7"),
        (["--latent", "0", "64"], r"latent\[0\] is 0, expected a whole number from 1"),
        (["--context", "0", "--batch", "0"], r"context is 0, .*; batch is 0, expected a whole"),
        (["--policy", "nothing"], r"policy 'nothing' is not one of"),
    ],
)
def test_bad_requests(change, message, capsys):
    command = ["plan", str(SHAPES / "llama-3-8b.json"), "--topology", "h200:8"]
    if change[0] == "--topology":
        command = command[:2]
    with pytest.raises(SystemExit):
        main([*command, *change])

    assert re.search(message, capsys.readouterr().err)
