"""RoRoPE in fp64: exact where everything rotates, the published fold, and what a basis gathers."""

import dataclasses

import numpy as np
import pytest

from kvjax.config import GQAConfig, RopeConfig
from kvjax.transmla import rotary

N, K, H = 6, 3, 8
BASES = {
    "full": GQAConfig(N, K, H, H**-0.5, RopeConfig(H)),
    "partial": GQAConfig(N, K, H, H**-0.5, RopeConfig(4)),
    "interleaved": GQAConfig(N, K, H, H**-0.5, RopeConfig(H, interleaved=True)),
    "none": GQAConfig(N, K, H, H**-0.5, None),
}
THETA = 10_000.0
ROTATIONS = {"real": rotary.real_rotation, "complex": rotary.complex_rotation}


def frequencies(base):
    dim = 0 if base.rope is None else base.rope.dim
    return THETA ** (-np.arange(0, dim, 2) / max(dim, 1))


def components(base, x):
    """[..., f·K] complex components of keys of all heads [..., K·H]."""
    real, imag = rotary.component_rows(base)
    return x[..., real] + 1j * x[..., imag]


def turn(x, angles):
    """Rotates the pairs (i, i + R/2) of x [..., R] by angles [R/2]."""
    a, b = np.split(x, 2, axis=-1)
    z = (a + 1j * b) * np.exp(1j * angles)
    return np.concatenate([z.real, z.imag], axis=-1)


def turn_head(base, x, position):
    """RoPE of one head [..., H], in the layout of the base."""
    if base.rope is None:
        return x
    out, R = x.copy(), base.rope.dim
    real, imag = (slice(0, R, 2), slice(1, R, 2))
    if not base.rope.interleaved:
        real, imag = slice(0, R // 2), slice(R // 2, R)
    z = (x[..., real] + 1j * x[..., imag]) * np.exp(1j * position * frequencies(base))
    out[..., real], out[..., imag] = z.real, z.imag
    return out


def statistics(base, keys, queries, spread=1.0):
    kappa = components(base, keys.reshape(len(keys), K * H))
    f = kappa.shape[1] // K
    covariance = kappa.conj().T @ kappa / len(keys)
    per_group = (queries**2).mean(0).reshape(K, N // K, H).sum(1).reshape(-1)
    real, imag = rotary.component_rows(base)
    energy = per_group[real] + per_group[imag]
    return rotary.KeyStatistics(covariance, energy, np.ones(f, complex), np.full(f, spread), K)


def draw(seed=0, count=50):
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((K * H, K * H))
    keys = (rng.standard_normal((count, K * H)) @ mix).reshape(count, K, H)
    return keys, rng.standard_normal((count, N, H))


def logits(base, split, q, k, at_q, at_k):
    """[N] logits of one query and one key through a split."""
    k = k.reshape(-1)
    k_rope, k_nope = k @ split.key_rope, k @ split.key_nope
    q_rope = np.einsum("nh,nhr->nr", q, split.query_rope)
    q_nope = np.einsum("nh,nhw->nw", q, split.query_nope)
    out = q_nope @ k_nope
    if split.rope is None:
        return out
    angles = frequencies(base)[list(split.rope.scaling.pairs)]
    return out + turn(q_rope, at_q * angles) @ turn(k_rope, at_k * angles)


def gqa_logits(base, q, k, at_q, at_k):
    q, k = turn_head(base, q, at_q), np.repeat(turn_head(base, k, at_k), N // K, axis=0)
    return np.einsum("nh,nh->n", q, k)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("rotation", ROTATIONS)
def test_scores_stay_where_everything_rotates(rotation, name):
    base = BASES[name]
    keys, queries = draw()
    stats = statistics(base, keys, queries)
    basis = rotary.by_energy(stats, ROTATIONS[rotation], len(stats.keys))
    split = rotary.partial_rope(base, basis, stats.turning)
    assert split.key_rope.shape[1] + split.key_nope.shape[1] == K * H
    for t in range(3):
        args = (queries[t], keys[t + 1], 41, 7 * t)
        want = gqa_logits(base, *args)
        np.testing.assert_allclose(logits(base, split, *args), want, rtol=1e-11, atol=1e-10)


def test_any_invertible_map_within_a_frequency_is_exact():
    base, (keys, queries) = BASES["full"], draw()
    stats = statistics(base, keys, queries)
    rng = np.random.default_rng(3)

    def odd(block):
        return rng.standard_normal(block.shape) + 1j * rng.standard_normal(block.shape)

    split = rotary.partial_rope(base, rotary.by_energy(stats, odd, len(stats.keys)), stats.turning)
    args = (queries[0], keys[1], 30, 11)
    np.testing.assert_allclose(
        logits(base, split, *args), gqa_logits(base, *args), rtol=1e-9, atol=1e-9
    )


def test_what_does_not_rotate_gets_the_constant():
    base, (keys, queries) = BASES["full"], draw()
    stats = statistics(base, keys, queries)
    rng = np.random.default_rng(1)
    constants = rng.standard_normal(4) + 1j * rng.standard_normal(4)
    split = rotary.partial_rope(
        base, rotary.by_energy(stats, rotary.complex_rotation, 0), constants
    )
    assert split.rope is None and split.key_rope.shape == (K * H, 0)
    # q·k with e^(iΔθ) replaced by c: Re Σ conj(χ·c)·κ, head by head.
    q, k = queries[0], keys[0]
    chi, kappa = (x[..., :4] + 1j * x[..., 4:] for x in (q, np.repeat(k, N // K, axis=0)))
    want = ((chi * constants).conj() * kappa).real.sum(-1)
    np.testing.assert_allclose(logits(base, split, q, k, 9, 2), want, rtol=1e-11)


def test_complex_unitaries_gather_at_least_as_much_energy():
    base, (keys, queries) = BASES["full"], draw()
    stats = statistics(base, keys, queries)

    def gathered(rotation):
        basis = rotary.every(1)(stats, rotation, 4)
        kappa = components(base, keys.reshape(-1, K * H)) @ basis.vectors[:, list(basis.kept)]
        return (np.abs(kappa) ** 2).sum()

    assert gathered(rotary.complex_rotation) > gathered(rotary.real_rotation)


def test_bases_do_not_depend_on_the_phases_of_eigenvectors():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((9, 4)) + 1j * rng.standard_normal((9, 4))
    covariance = a.conj().T @ a
    basis = rotary.complex_rotation(covariance)
    np.testing.assert_allclose(basis.conj().T @ basis, np.eye(4), atol=1e-12)
    pivots = np.take_along_axis(basis, np.abs(basis).argmax(0)[None], 0)
    np.testing.assert_allclose(pivots.imag, 0, atol=1e-12)
    assert (pivots.real > 0).all()
    energy = np.einsum("ac,ab,bc->c", basis.conj(), covariance, basis).real
    assert (np.diff(energy) <= 1e-9).all()


def test_by_energy_keeps_what_loses_most():
    base, (keys, queries) = BASES["full"], draw()
    keys = keys.copy()
    keys[:, :, [1, 5]] *= 100  # frequency 1 carries nearly everything
    stats = statistics(base, keys, queries)
    basis = rotary.by_energy(stats, rotary.complex_rotation, 3)
    assert basis.pairs == (1, 1, 1)  # more than once, and others not at all
    still = dataclasses.replace(stats, spread=np.array([1.0, 0.0, 1.0, 1.0]))
    assert 1 not in rotary.by_energy(still, rotary.complex_rotation, 3).pairs


def test_fold_of_one_keeps_the_first_component_of_each_frequency():
    base, (keys, queries) = BASES["full"], draw()
    stats = statistics(base, keys, queries)
    folded = rotary.fold(1)(stats, rotary.real_rotation, 4)
    assert folded.pairs == (0, 1, 2, 3) and folded.kept == (0, K, 2 * K, 3 * K)
    np.testing.assert_array_equal(
        folded.vectors, rotary.every(1)(stats, rotary.real_rotation, 4).vectors
    )


def test_fold_of_two_collapses_neighbours():
    base, (keys, queries) = BASES["full"], draw()
    stats = statistics(base, keys, queries)
    folded = rotary.fold(2)(stats, rotary.real_rotation, 2)
    assert folded.pairs == (0, 2) and folded.kept == (0, 2 * K)
    whole = rotary.fold(4)(stats, rotary.real_rotation, 2)
    assert whole.pairs == (0, 2) and whole.kept == (0, 1)
    with pytest.raises(ValueError, match="FreqFold 1 of 4 frequencies cannot keep 2"):
        rotary.fold(1)(stats, rotary.real_rotation, 2)
    with pytest.raises(
        ValueError, match="cannot keep 3 of them, expected rope_dim / 2 to be a div"
    ):
        rotary.fold(2)(stats, rotary.real_rotation, 3)
