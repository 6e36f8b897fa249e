"""Factor pairs: exact, balanced, the paper's, and what may stand on which side of RoPE."""

import numpy as np
import pytest

from kvjax.config import RopeConfig
from kvjax.transmla.inits import (
    INITS,
    Factors,
    balanced_svd,
    check_factors,
    commutes_with_rope,
    identity,
    is_selector,
    resolve_init,
    svd_complex,
    svd_global,
)

D, K, H, G = 48, 3, 8, 2
ROPES = {"full": RopeConfig(H), "partial": RopeConfig(4), "none": None}
ROPES["interleaved"] = RopeConfig(H, interleaved=True)


def weight(rows=D, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, K, H))


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("rows", [D, 5, 2])  # fewer input rows than K·H, and than K
@pytest.mark.parametrize("init", INITS)
def test_product_is_the_repeated_weight(init, rows, rope):
    w = weight(rows)
    factors = INITS[init](w, G, ROPES[rope])
    wide = np.repeat(w, G, axis=1)
    np.testing.assert_allclose(factors.product(), wide, atol=1e-12)
    np.testing.assert_allclose(factors.wide().product(), wide, atol=1e-12)
    check_factors(factors, w, G)
    check_factors(factors.wide(), w, G)


def test_svd_global_is_the_svd_of_the_wide_matrix():
    w = weight()
    factors = svd_global(w, G, None)
    u, s, vh = np.linalg.svd(np.repeat(w, G, axis=1).reshape(D, -1), full_matrices=False)
    rank = K * H
    down, up = u[:, :rank] * np.sqrt(s[:rank]), np.sqrt(s[:rank, None]) * vh[:rank]
    np.testing.assert_allclose(abs(factors.down[:, 0]), abs(down), atol=1e-10)
    np.testing.assert_allclose(abs(factors.up.reshape(rank, -1)), abs(up), atol=1e-10)


@pytest.mark.parametrize("init", [name for name in INITS if name != "identity"])
def test_svd_factors_are_balanced(init):
    factors = INITS[init](weight(), G, RopeConfig(H))
    down = np.linalg.norm(factors.down, axis=0).reshape(K, 2, H // 2)
    up = np.linalg.norm(factors.up, axis=(2, 3)).reshape(K, 2, H // 2)
    if init == "svd_complex":  # real and imaginary parts in all
        down, up = np.linalg.norm(down, axis=1), np.linalg.norm(up, axis=1)
    np.testing.assert_allclose(down, up)


def test_signs_do_not_depend_on_the_svd():
    matrix = weight()[:, 0] + 1j * weight(seed=1)[:, 0]
    left, right = balanced_svd(matrix, 1)
    turned_left, turned_right = balanced_svd(-matrix, 1)
    np.testing.assert_allclose(left, -turned_left, atol=1e-12)
    np.testing.assert_allclose(right, turned_right, atol=1e-12)


@pytest.mark.parametrize("rope", ["full", "partial", "interleaved"])
def test_which_inits_commute_with_rope(rope):
    config = ROPES[rope]
    commuting = {
        name for name in INITS if commutes_with_rope(INITS[name](weight(), G, config).up, config)
    }
    assert commuting == {"identity", "svd_complex"}
    assert commutes_with_rope(identity(weight(), G, config).wide().up, config)
    assert all(commutes_with_rope(INITS[name](weight(), G, None).up, None) for name in INITS)


def test_only_identity_is_a_selector():
    selectors = {name for name in INITS if is_selector(INITS[name](weight(), G, None).up)}
    assert selectors == {"identity"}
    assert is_selector(identity(weight(), G, None).wide().up)
    assert not is_selector(2 * identity(weight(), G, None).up)


def test_svd_complex_keeps_frequencies_apart():
    up = svd_complex(weight(), G, RopeConfig(H)).up.reshape(K, H, K * G, H)
    frequency = np.arange(H) % (H // 2)
    other = frequency[:, None] != frequency[None]
    assert np.abs(np.moveaxis(up, 2, 1)[..., other]).max() == 0
    # Heads do mix.
    assert np.abs(up[0, 0, G:]).max() > 1e-3


def test_a_wrong_init_is_refused():
    w = weight()
    good = svd_global(w, G, None)
    with pytest.raises(ValueError, match=r"differs from the weight by 1\.0e"):
        check_factors(Factors(2 * good.down, good.up), w, G)
    with pytest.raises(ValueError, match=r"gave down and up of shapes .* expected .* or "):
        check_factors(Factors(good.down[..., :-1], good.up[:, :-1]), w, G)
    nan = np.full_like(good.down, np.nan)
    with pytest.raises(ValueError, match="differs from the weight by nan"):
        check_factors(Factors(nan, good.up), w, G)


def test_init_names():
    assert resolve_init("svd_global") is svd_global
    assert resolve_init(identity) is identity
    with pytest.raises(ValueError, match="'pca' is not one of svd_global, svd_per_head, identity"):
        resolve_init("pca")
