"""Curves of need: the measured losses are those of compressed caches; budgets follow the curves."""

import dataclasses

import numpy as np
import pytest
from meshes import GQA, LATENTS, MLA, WINDOWED, toy

import kvjax
from eval.results import score_digests
from kvjax import policies
from kvjax.example import Example
from kvjax.headkv import measure_need
from kvjax.hf.source import BUILTIN_DIRECTORY
from kvjax.policies.budgets import HeadImportance, Request
from kvjax.policies.importance import HeadScores, load_scores
from kvjax.policies.named import resolve
from kvjax.policies.need import MeasuredNeed, NeedCurves, load_need, need_caps, need_path
from kvjax.policies.policy import Compress
from kvjax.policies.scorers import ObservationWindow, SpanWindow
from kvjax.scoring import Text, judge_compressed

SIZES, OBSERVED, BASE = (0, 3), 4, 2
NEED_FILE = "head_scores.need.json"


def examples(lengths=(30, 22), answers=(3, 2)):
    rng = np.random.default_rng(0)
    draw = lambda n: tuple(rng.integers(0, 64, n).tolist())  # noqa: E731
    return [Example(draw(n), draw(m)) for n, m in zip(lengths, answers, strict=True)]


@dataclasses.dataclass(frozen=True)
class Fixed:
    """Gives every head the base, and one head another size."""

    layer: int
    head: int | None  # None for all heads of the layer
    size: int

    def __call__(self, request):
        caps = np.full((request.num_layers, request.num_kv_heads), BASE)
        caps[self.layer, slice(None) if self.head is None else self.head] = self.size
        return np.minimum(caps, request.limits)


def loss(model, params, example, layer, head, size):
    """Negative log-likelihood of the answer, from a cache that is really compressed."""
    ids, n = [*example.prompt, *example.answer], len(example.prompt)
    policy = Compress(Fixed(layer, head, size), ObservationWindow(), n, OBSERVED)
    ((_, [judged], _),) = judge_compressed(model, params, [Text(ids, n, n)], {0: policy}, 1)
    return float(judged.losses.sum(dtype=np.float64))


@pytest.mark.parametrize("attention", [(GQA, WINDOWED), (MLA, MLA), (LATENTS, GQA)])
def test_losses_are_those_of_compressed_caches(attention):
    model, params = toy(*attention)
    asked = examples()
    curves = measure_need(
        model, params, asked, ObservationWindow(), SIZES, (BASE,), OBSERVED, batch_size=2
    )
    assert curves.sizes.tolist() == [*SIZES, 30 - OBSERVED]
    heads = model.config.budget_heads
    for layer in range(2):
        # The heads of a latent layer keep the same tokens, and each has its part of the curve.
        alone = attention[layer].no_head_budget is None
        head, parts = (heads - 1, 1) if alone else (None, heads)
        for place, size in enumerate(SIZES):
            found = [
                loss(model, params, example, layer, head, size)
                - loss(model, params, example, layer, head, 99)
                for example in asked
            ]
            got = curves.rises[layer, -1, place] * parts
            np.testing.assert_allclose(got, np.mean(found), atol=2e-5)
    assert (curves.rises[..., -1] == 0).all()


def test_batches_and_bases(tmp_path, monkeypatch):
    """Finished batches are taken over; the curves of several bases are their mean."""
    model, params = toy(GQA, GQA)
    asked, done = examples((30, 22, 26), (3, 3, 3)), []
    settings = {"sizes": SIZES, "observed": OBSERVED, "batch_size": 2}
    both = measure_need(model, params, asked, bases=(0, 4), **settings, on_batch=done.append)
    each = [measure_need(model, params, asked, bases=(base,), **settings) for base in (0, 4)]
    mean = np.mean([curves.rises for curves in each], axis=0)
    np.testing.assert_allclose(both.rises, mean, atol=1e-9)
    # Nothing is measured again.
    with monkeypatch.context() as patch:
        patch.setattr("kvjax.headkv.need.batch_need", lambda *_: pytest.fail("it measures again"))
        again = measure_need(model, params, asked, bases=(0, 4), **settings, finished=done)
    np.testing.assert_array_equal(again.rises, both.rises)
    assert again.meta == both.meta and both.meta["bases"] == [0, 4]
    # The file, and the policy that names it.
    both.save(tmp_path / "need.json")
    held = load_need(tmp_path / "need.json", model.config)
    np.testing.assert_array_equal(held.rises, both.rises)
    np.testing.assert_array_equal(held.errors, both.errors)
    policy = f"headkv:kv_size=12,observed=4,need={tmp_path / 'need.json'}"
    out = kvjax.generate(model, params, [asked[0].prompt], policy=policy, max_new_tokens=2)
    assert len(out.tokens[0]) == 2
    # A run that is resumed sees whether the curves have changed.
    digests = score_digests({"a": policies.parse_policy(policy)})
    both.rises[0, 0, 0] += 1
    both.save(tmp_path / "need.json")
    assert score_digests({"a": policies.parse_policy(policy)}) != digests
    with pytest.raises(ValueError, match=r"curves of 2 layers x 4 KV heads, expected 1 layers x 4"):
        kvjax.generate(*toy(GQA), [[1, 2, 3]], policy=policy, max_new_tokens=2)


def curves(rises, sizes=(0, 2, 8, 100)):
    rises = np.asarray(rises, float)
    return NeedCurves(np.asarray(sizes), rises, np.zeros_like(rises))


def test_tokens_go_where_the_loss_falls_most():
    # Head 0 needs eight tokens at once, head 1 two; nothing helps the others.
    found = curves([[[4, 4, 0, 0], [3, 0, 0, 0]], [[0, 0, 0, 0], [0, 0, 0, 0]]])
    limits = np.asarray([[50], [50]])
    assert need_caps(found, 1, limits).tolist() == [[2, 2], [0, 0]]
    caps = need_caps(found, 3, limits)
    assert caps[0].tolist() == [8, 2] and caps.sum() == 12
    # The rest is divided evenly, after the head that needs most; no head is above its limit.
    caps = need_caps(found, 20, limits)
    assert caps.sum() == 80 and caps[0, 0] == caps.max() and caps[1].min() >= 10
    assert (need_caps(found, 60, limits) == 50).all()
    assert need_caps(found, 30, np.asarray([[50], [4]])).tolist() == [[50, 50], [4, 4]]


def test_budgets_grow_and_sum_exactly():
    rng = np.random.default_rng(1)
    found = curves(np.sort(rng.random((3, 4, 4)), axis=2)[..., ::-1] * [1, 1, 1, 0])
    before = np.zeros((3, 4), int)
    for kv_size in range(9, 70, 7):
        caps = MeasuredNeed(found)(Request(3, 4, kv_size, 8, 64))
        assert caps.sum() == min(kv_size - 8, 56) * 12 and (caps >= before - 1).all()
        before = caps


def test_convex_falls():
    """The falls never rise, and a curve that rises in between attracts no tokens."""
    falls = curves([[[5, 5, 1, 0], [1, 2, 0.5, 0]]]).falls
    assert (np.diff(falls, axis=2) <= 1e-12).all() and (falls >= 0).all()
    flat = curves([[[0, 0, 0, 0], [0, 0, 0, 0]]])
    assert need_caps(flat, 5, np.asarray([[20]])).tolist() == [[5, 5]]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sizes": np.asarray([0, 4, 4, 9])}, r"sizes are \[0, 4, 4, 9\], expected rising sizes"),
        ({"rises": np.zeros((2, 2, 3))}, r"rises are \(2, 2, 3\) and errors \(1, 2, 4\), expected"),
        ({"errors": np.full((1, 2, 4), -1.0)}, "expected finite numbers, errors >= 0"),
    ],
)
def test_bad_curves(change, message):
    good = curves(np.zeros((1, 2, 4)))
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(good, **change)


def test_bad_files(tmp_path):
    path = tmp_path / "need.json"
    with pytest.raises(ValueError, match="no file of need curves at"):
        load_need(path)
    for text, message in (
        ("[]", "holds a list, expected an object"),
        ('{"format": 9}', "format is 9, expected 1"),
        ('{"format": 1, "sizes": [0, 2], "rises": [[[1]]], "errors": [[[0]]]}', "rises are"),
        ('{"format": 1, "sizes": [0, 2]}', "rises is missing, expected"),
        ("{", "not JSON"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_need(path)


def test_budgets_are_the_mean_of_both(tmp_path):
    model, _ = toy(GQA, GQA)
    found = curves(np.random.default_rng(2).random((2, 4, 4)) * [3, 2, 1, 0])
    found.save(tmp_path / "need.json")
    heads = HeadScores(np.random.default_rng(3).random((2, 8, 5)))
    request = Request(2, 4, 20, 8, 64)
    alone = MeasuredNeed(found)(request), HeadImportance(None, heads)(request)
    mean = np.mean(alone, axis=0)
    policy = policies.headkv(kv_size=20, need=str(tmp_path / "need.json"))
    resolved = resolve(policy, model.config, heads)
    caps = resolved.allocator(request)
    assert caps.sum() == 12 * 8 and (np.abs(caps - mean) < 1).all() and (caps != alone[0]).any()
    # A model without head scores has its curves.
    without = resolve(policy, model.config, None)
    np.testing.assert_array_equal(without.allocator(request), alone[0])
    digests = score_digests({"both": resolved, "curves": without})
    assert digests["both"].startswith(digests["curves"] + "+")


def test_the_files_that_ship_belong_together():
    folder = BUILTIN_DIRECTORY / "smollm2"
    heads, found = load_scores(folder / "head_scores.json"), load_need(folder / NEED_FILE)
    assert need_path(folder / "head_scores.json") == folder / NEED_FILE
    assert heads.samples.shape[:2] == (30, 9) and found.rises.shape == (30, 3, 5)
    assert heads.meta["weights"] == found.meta["weights"]


def test_a_scorer_of_ones_own_may_watch_all_queries():
    model, params = toy(GQA)
    expected = policies.expected(kv_size=16).scorer
    found = measure_need(model, params, examples(), expected, SIZES, (BASE,), OBSERVED)
    assert np.isfinite(found.rises).all() and found.meta["scorer"].startswith("ExpectedAttention")
    default = measure_need(model, params, examples(), None, SIZES, (BASE,), OBSERVED)
    assert default.meta["scorer"] == repr(SpanWindow())


def test_no_examples():
    model, params = toy(GQA)
    with pytest.raises(ValueError, match="got no examples"):
        measure_need(model, params, [])
