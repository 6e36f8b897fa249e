"""Standard error, McNemar's test and pass@k against values worked out another way."""

import itertools
import math

import pytest

from eval.results import mcnemar, pass_at_k, standard_error


def pairs(both, only_first, only_second, neither):
    first = [1] * both + [1] * only_first + [0] * only_second + [0] * neither
    second = [1] * both + [0] * only_first + [1] * only_second + [0] * neither
    return first, second


def test_standard_error_of_coin_flips():
    # s² = n·p(1 − p) / (n − 1), so that s/√n = √(p(1 − p) / (n − 1))
    assert standard_error([1, 0, 1, 0]) == pytest.approx(math.sqrt(0.25 / 3))
    assert standard_error([1.0] * 5) == 0
    assert standard_error([0] * 725 + [1] * 594) == pytest.approx(0.0137, abs=1e-4)  # GSM8K
    assert math.isnan(standard_error([1]))


@pytest.mark.parametrize(
    ("only_first", "only_second", "p_value"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),  # 2 · 1/2
        (5, 0, 2 / 32),
        (0, 5, 2 / 32),
        (7, 1, 2 * (1 + 8) / 256),
        (8, 2, 2 * (1 + 10 + 45) / 1024),
        (3, 3, 1.0),  # more than 1 before it is cut
        (2, 4, 2 * (1 + 6 + 15) / 64),
    ],
)
def test_mcnemar_by_hand(only_first, only_second, p_value):
    found = mcnemar(*pairs(30, only_first, only_second, 10))
    assert (found.only_first, found.only_second) == (only_first, only_second)
    assert found.p_value == pytest.approx(p_value)


def test_mcnemar_of_many_is_finite():
    assert 0 < mcnemar(*pairs(0, 700, 619, 0)).p_value < 0.05


@pytest.mark.parametrize(("first", "second"), [([1], [1, 0]), ([0.5], [1])])
def test_mcnemar_refuses(first, second):
    with pytest.raises(ValueError, match="expected"):
        mcnemar(first, second)


@pytest.mark.parametrize("samples", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_pass(samples):
    for passed, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        subsets = list(itertools.combinations([1] * passed + [0] * (samples - passed), k))
        share = sum(map(any, subsets)) / len(subsets)
        assert pass_at_k(samples, passed, k) == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize(("samples", "passed", "k"), [(3, 4, 1), (3, -1, 1), (3, 1, 4), (3, 1, 0)])
def test_pass_at_k_refuses(samples, passed, k):
    with pytest.raises(ValueError, match="expected"):
        pass_at_k(samples, passed, k)
