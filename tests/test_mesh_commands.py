"""Converting, scoring and evaluating on eight devices gives what one device gives."""

import json

import jax
import numpy as np
import pytest
from meshes import GQA, SHAPES, mesh_of_eight, spread, toy

import kvjax
from kvjax import transmla
from kvjax.prefilling import group_rows

SHAPE = "data=2,fsdp=2,tensor=2"


@pytest.fixture(scope="module")
def gqa():
    return toy(GQA, GQA)


CONVERSIONS = {
    "equal_cache": lambda model, params: transmla.convert(model, params, init="svd_global"),
    "decoupled": lambda model, params: decoupled(model, params, recipe=transmla.published(1)),
}


@pytest.fixture(scope="module")
def converted(gqa):
    """What each conversion gives on one device."""
    return {name: convert(*gqa) for name, convert in CONVERSIONS.items()}


@pytest.mark.parametrize("shape", SHAPES)
def test_converted_weights(gqa, converted, shape):
    """Equal and where they belong, from statistics that were taken on the mesh."""
    model, params = gqa
    many = spread(model, params, shape)
    for name, convert in CONVERSIONS.items():
        (made, want), (_, got) = converted[name], convert(model, many)
        places = kvjax.sharding.param_shardings(made, mesh_of_eight(shape))
        for path, leaf in jax.tree_util.tree_leaves_with_path(want):
            here = leaf_at(got, path)
            assert here.sharding.is_equivalent_to(leaf_at(places, path), leaf.ndim)
            np.testing.assert_allclose(here, leaf, atol=1e-4, err_msg=jax.tree_util.keystr(path))


def test_fitted_weights_compute_the_same(gqa):
    """Fits leave a latent's basis free, so that rounding moves weights; what they compute stays.

    On four devices, which shard the batches and both axes of the weights: a fit is a loop of small
    sums over all devices, and eight threads would wait for each other most of the time.
    """
    if len(jax.devices()) < 4:
        pytest.skip("needs 4 devices")
    model, params = gqa
    mesh = kvjax.sharding.make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    tokens = np.random.default_rng(5).integers(0, 64, (4, 32))
    logits = []
    on_host = jax.tree.map(np.asarray, params)
    for where in (params, kvjax.sharding.place_params(model, on_host, mesh)):
        made, found = decoupled(model, where)
        logits.append(jax.jit(made.apply)({"params": found}, tokens)[0])
    scale = float(np.abs(logits[0]).max())
    np.testing.assert_allclose(logits[0] / scale, logits[1] / scale, atol=1e-3)


def decoupled(model, params, **settings):
    batches = np.random.default_rng(0).integers(0, 64, (2, 8, 32))
    stats = transmla.calibrate(model, params, batches)
    sizes = {"method": "decoupled", "kv_rank": 24, "rope_dim": 16}
    return transmla.convert(model, params, stats=stats, **sizes, **settings)


def leaf_at(tree, path):
    for key in path:
        tree = tree[key.key]
    return tree


def test_logits_and_losses(gqa):
    model, params = gqa
    tokens = np.random.default_rng(1).integers(0, 64, (8, 24))
    apply = jax.jit(model.apply)
    want = apply({"params": params}, tokens)[0]
    for shape in SHAPES:
        got = apply({"params": spread(model, params, shape)}, tokens)[0]
        np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.slow
def test_scores_and_evaluation_of_the_embedded_model(tmp_path):
    """Through the commands, with --mesh."""
    from eval.command import run_task
    from kvjax.cli import main

    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    found = {}
    for name, mesh in (("one", []), ("many", ["--mesh", SHAPE])):
        score = ["score", "builtin:needle", str(tmp_path / f"{name}.json"), "--samples", "8"]
        main([*score, "--length", "128", "--json", str(tmp_path / "report.json"), *mesh])
        task = [
            "--model",
            "builtin:needle",
            "--lengths",
            "128",
            "--count",
            "2",
            "--dtype",
            "float32",
        ]
        task += ["--policy", "full", "--policy", "headkv:kv_size=32", "--protocol", "teacher"]
        run_task("needle", [*task, "--out", str(tmp_path / name), *mesh])
        found[name] = (
            kvjax.headkv.load_scores(tmp_path / f"{name}.json").samples,
            json.loads((tmp_path / name / "results.json").read_text())["policies"],
        )
    np.testing.assert_allclose(found["one"][0], found["many"][0], atol=1e-4)
    for one, many in zip(found["one"][1], found["many"][1], strict=True):
        assert (one["policy"], one["all"]) == (many["policy"], many["all"])


def test_a_streamed_conversion(gqa, tmp_path):
    from kvjax.commands.convert import EqualCacheSettings, convert_to_equal_cache

    model, params = gqa
    mesh_of_eight(SHAPE)
    kvjax.save(model, params, tmp_path / "source")
    settings = (EqualCacheSettings(), "float32")
    for name, mesh in (("one", None), ("many", SHAPE)):
        convert_to_equal_cache(str(tmp_path / "source"), tmp_path / name, *settings, mesh)
    (_, one), (_, many) = (kvjax.load(tmp_path / name, "float32") for name in ("one", "many"))
    for ours, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_prompts_in_groups(gqa):
    model, params = gqa
    prompts = [np.random.default_rng(n).integers(0, 64, 20 + n).tolist() for n in range(8)]
    policy = "snapkv:kv_size=14,observed=4"
    want = kvjax.generate(model, params, prompts, 4, policy=policy, eos_ids=())
    for where in (params, spread(model, params, "data=2,tensor=4")):
        got = kvjax.generate(model, where, prompts, 4, policy=policy, eos_ids=(), prefill_size=4)
        assert (got.tokens, got.full_cache_bytes) == (want.tokens, want.full_cache_bytes)
    with pytest.raises(ValueError, match="prefill_size is 0, expected a whole number from 1"):
        kvjax.generate(model, params, prompts, 4, prefill_size=0)


def test_groups_take_as_many_of_every_share():
    np.testing.assert_array_equal(group_rows(8, 4, 2), [[0, 1, 4, 5], [2, 3, 6, 7]])
    np.testing.assert_array_equal(group_rows(6, 4, 1), [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(group_rows(4, 1, 2), [[0, 2], [1, 3]])
    assert group_rows(8, None, 2).tolist() == [list(range(8))]
