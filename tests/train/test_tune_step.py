"""The step: packed documents apart, sums that add up, nothing kept for what is frozen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tuning_toys import KINDS, packed_batch, toy, wide_model

from train.finetune import loss as losses
from train.finetune.setup import partition, trainable_paths
from train.finetune.step import TuneStep, adamw, compile_step, flatten, learning_rate

OPTIMIZER = adamw(0.9, 0.999, 0.1, 1.0)
OWN = ("tokens", "targets", "weights")  # what a document has of a packed row
ROWS = 8  # of a batch for one device, so that eight devices can share the batch


def prepare(model, params, which=("kv_only",), **settings):
    trainable, frozen = partition(params, trainable_paths(model, params, which))
    step = TuneStep(model, OPTIMIZER, dtype="float32", **settings)
    return step, step.init(trainable), frozen


def sums(model, params, batch, **settings):
    x = losses.hidden(model, params, batch, remat=False)
    return losses.sum_losses(model, params, x, batch, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_are_what_they_are_alone(kind):
    model, params = toy(kind)
    batch = packed_batch(model.config.vocab_size)
    arrays = jax.device_get(batch)
    packed = jax.jit(functools.partial(sums, model))(params, batch)
    total, weight = 0.0, 0.0
    forward = jax.jit(lambda tokens, at: model.apply({"params": params}, tokens, at)[0])
    for row in range(4):
        for segment in range(1, arrays["segment_ids"][row].max() + 1):
            own = arrays["segment_ids"][row] == segment
            pad = 0, 24 - own.sum()  # documents of all lengths share the programs
            at = np.pad(np.arange(own.sum(), dtype=np.int32), pad, constant_values=-1)
            tokens, targets, weights = (np.pad(arrays[name][row][own], pad) for name in OWN)
            logits = forward(tokens[None], at[None])
            own_losses = optax.softmax_cross_entropy_with_integer_labels(logits[0], targets)
            total += float((own_losses * weights).sum())
            weight += float(weights.sum())
    np.testing.assert_allclose(float(packed.loss), total, rtol=2e-5)
    assert float(packed.weight) == weight


def test_slices_of_the_logits_change_nothing(monkeypatch):
    model, params = toy("gqa")
    batch = packed_batch(model.config.vocab_size)

    def run():
        function = lambda p: sums(model, p, batch).loss  # noqa: E731
        return jax.value_and_grad(function)(params)

    whole = run()
    monkeypatch.setattr(losses, "LOGITS", 4 * model.config.vocab_size * 5)  # 5 of 24 tokens
    sliced = run()
    np.testing.assert_allclose(whole[0], sliced[0], rtol=1e-6)
    for a, b in zip(jax.tree.leaves(whole[1]), jax.tree.leaves(sliced[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_divergence_from_itself_is_zero_and_from_another_is_not():
    model, params = toy("gqa")
    batch = packed_batch(model.config.vocab_size)
    other = jax.tree.map(lambda leaf: leaf * 1.1, params)
    x = losses.hidden(model, other, batch, remat=False)
    same = sums(
        model, params, batch, teacher=(model, params, losses.hidden(model, params, batch, False))
    )
    apart = sums(model, params, batch, teacher=(model, other, x))
    assert abs(float(same.divergence)) < 1e-5
    inputs, segments = (batch["tokens"], batch["positions"]), batch["segment_ids"]
    logits = [model.apply({"params": w}, *inputs, segment_ids=segments)[0] for w in (other, params)]
    p, q = (np.asarray(jax.nn.log_softmax(leaf), np.float64) for leaf in logits)
    by_hand = ((np.exp(p) * (p - q)).sum(-1) * np.asarray(batch["weights"])).sum()
    np.testing.assert_allclose(float(apart.divergence), by_hand, rtol=1e-4)
    assert by_hand > 0.01


def one_step(step, state, frozen, batch, rate=1e-2, teacher=None):
    arguments = state, frozen, batch, jnp.float32(rate), teacher
    return compile_step(step, *arguments).call(*arguments)


@pytest.mark.parametrize(
    "settings", [{"accumulate": 2}, {"remat": True}, {"accumulate": 4, "remat": True}]
)
def test_accumulation_and_remat_are_the_same_step(settings):
    model, params = toy("equal_cache")
    batch = packed_batch(model.config.vocab_size, ROWS)
    want, want_metrics = one_step(*prepare(model, params), batch)
    got, metrics = one_step(*prepare(model, params, **settings), batch)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], want_metrics[name], rtol=1e-5, err_msg=name)
    # Adam's first update is close to the gradient's sign: compare the moments.
    for a, b in zip(jax.tree.leaves(got.opt_state), jax.tree.leaves(want.opt_state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_falls_and_what_is_frozen_stays(kind):
    model, params = toy(kind)
    step, state, frozen = prepare(model, params)
    before = {path: np.array(leaf) for path, leaf in frozen.items()}
    batch = packed_batch(model.config.vocab_size, ROWS)
    arguments = state, frozen, batch, jnp.float32(3e-3), None
    compiled, found = compile_step(step, *arguments), []
    for _ in range(12):
        state, metrics = compiled.call(state, frozen, batch, jnp.float32(3e-3), None)
        found.append(float(metrics["loss"]))
    assert found[-1] < 0.9 * found[0]
    assert state.params.keys() | frozen.keys() == flatten(params).keys()
    for path, leaf in frozen.items():
        np.testing.assert_array_equal(leaf, before[path])
        assert leaf is frozen[path]
    moved = [not np.array_equal(leaf, flatten(params)[path]) for path, leaf in state.params.items()]
    assert all(moved)


def test_no_buffer_for_a_frozen_weight():
    """Neither a moment among the arguments nor a gradient among the temporaries."""
    model, params = wide_model()
    batch = packed_batch(model.config.vocab_size)
    batch = {name: np.asarray(leaf)[:1, :8] for name, leaf in batch.items()}
    size = {"trainable": 0, "frozen": 0}
    compiled = {}
    for which in ("kv_only", "all"):
        step, state, frozen = prepare(model, params, (which,))
        compiled[which] = compile_step(step, state, frozen, batch, jnp.float32(0.1)).call
        if which == "kv_only":
            size["trainable"] = 4 * sum(leaf.size for leaf in state.params.values())
            size["frozen"] = 4 * sum(leaf.size for leaf in frozen.values())
    small, whole = (compiled[which].memory_analysis() for which in ("kv_only", "all"))
    batch_bytes = sum(leaf.nbytes for leaf in batch.values())
    assert small.argument_size_in_bytes <= 3 * size["trainable"] + size["frozen"] + batch_bytes + 64
    assert small.output_size_in_bytes <= 3 * size["trainable"] + 1024
    one_weight = 64 * 8192 * 4  # of six in the MLPs
    # The backward pass transposes a weight at a time.
    assert small.temp_size_in_bytes < 2 * one_weight
    assert whole.temp_size_in_bytes > 5 * one_weight
    assert whole.argument_size_in_bytes > 3 * size["frozen"]


def test_bf16_compute_keeps_fp32_masters():
    model, params = toy("equal_cache")
    trainable, frozen = partition(params, trainable_paths(model, params, ("kv_only",)))
    frozen = {path: leaf.astype(jnp.bfloat16) for path, leaf in frozen.items()}
    step = TuneStep(model, OPTIMIZER, dtype="bfloat16")
    batch = packed_batch(model.config.vocab_size)
    state, metrics = one_step(step, step.init(trainable), frozen, batch, rate=1e-6)
    assert {leaf.dtype for leaf in state.params.values()} == {jnp.dtype("float32")}
    # A change below bf16's resolution is kept.
    path = "layers_0/attn/k_up"
    change = np.abs(np.asarray(state.params[path]) - np.asarray(trainable[path]))
    assert 0 < change.max() < 1e-5
    exact, _ = toy("equal_cache"), None
    want = sums(exact[0], exact[1], batch)
    np.testing.assert_allclose(float(metrics["loss"]), float(want.loss / want.weight), rtol=0.03)


def test_distillation_pulls_towards_the_teacher():
    original, original_params = toy("gqa")
    model, params = toy("fold")
    batch = packed_batch(model.config.vocab_size)
    step, state, frozen = prepare(model, params, teacher=original, distill=10.0)
    arguments = state, frozen, batch, jnp.float32(3e-3), original_params
    compiled, found = compile_step(step, *arguments), []
    for _ in range(10):
        state, metrics = compiled.call(state, *arguments[1:])
        found.append(float(metrics["divergence"]))
    assert found[-1] < 0.7 * found[0]


@pytest.mark.parametrize("kind", ["equal_cache", "fold"])
@pytest.mark.parametrize(
    "mesh", ["data=8", "data=2,tensor=4", "data=2,fsdp=2,tensor=2", "tensor=8"]
)
def test_the_same_step_on_eight_devices(mesh, kind):
    from kvjax.sharding import batch_sharding, make_mesh, param_shardings, parse_mesh

    model, params = toy(kind)
    batch = jax.device_get(packed_batch(model.config.vocab_size, ROWS))
    want, want_metrics = one_step(*prepare(model, params), batch)
    devices = make_mesh(parse_mesh(mesh), jax.devices()[:8])
    spread = jax.device_put(jax.device_get(params), param_shardings(model, devices))
    step, state, frozen = prepare(model, spread, sharding=batch_sharding(devices))
    got, metrics = one_step(step, state, frozen, jax.device_put(batch, batch_sharding(devices)))
    for name in metrics:
        np.testing.assert_allclose(metrics[name], want_metrics[name], rtol=1e-5, err_msg=name)
    for path, leaf in got.params.items():
        assert leaf.sharding == state.params[path].sharding
    for a, b in zip(jax.tree.leaves(got.opt_state), jax.tree.leaves(want.opt_state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_schedule():
    rates = [learning_rate(step, 100, 1.0, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0
    assert max(rates) == 1.0 and rates[55] == pytest.approx(0.5)
    assert np.all(np.diff(rates[10:]) < 0) and rates[-1] < 0.001
