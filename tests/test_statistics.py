"""Known values: the tables of Newcombe 1998 (Stat. Med. 17:857 and 17:2635) and of Fagerland, Lydersen & Laake 2014."""

from __future__ import annotations

import math

import pytest

from edgeguard.errors import InputError
from edgeguard.statistics import difference, mcnemar, paired_difference, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)
    mirrored = wilson(n - successes, n)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(successes: int, n: int) -> None:
    with pytest.raises(InputError):
        wilson(successes, n)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (5, 15), (12, 2), (59, 101), (1, 0), (7, 7)])
def test_mcnemar_is_the_binomial_test(first: int, second: int) -> None:
    n = first + second
    exact = min(1.0, 2 * sum(math.comb(n, k) for k in range(min(first, second) + 1)) / 2**n)
    assert mcnemar(first, second) == pytest.approx(exact, rel=1e-9)
    assert mcnemar(second, first) == mcnemar(first, second)


def test_mcnemar_known_values() -> None:
    assert mcnemar(5, 15) == pytest.approx(0.0414, abs=5e-5)
    assert mcnemar(12, 2) == pytest.approx(0.0129, abs=5e-5)
    assert 0 <= mcnemar(0, 100_000) < 1e-300
    with pytest.raises(InputError):
        mcnemar(-1, 2)


@pytest.mark.parametrize(("table", "low", "high"), [((36, 12, 2, 0), 0.0569, 0.3404), ((1, 1, 7, 12), -0.507, -0.026)])
def test_paired_difference(table: tuple[int, int, int, int], low: float, high: float) -> None:
    assert paired_difference(*table) == pytest.approx((low, high), abs=5e-4)
    both, first, second, neither = table
    assert paired_difference(both, second, first, neither) == pytest.approx((-high, -low), abs=5e-4)


def test_paired_difference_at_its_limits() -> None:
    assert paired_difference(0, 5, 0, 0)[1] <= 1
    low, high = paired_difference(0, 0, 0, 50)
    assert low == pytest.approx(-high)
    for table in ((0, 0, 0, 0), (-1, 1, 1, 1)):
        with pytest.raises(InputError):
            paired_difference(*table)


def test_the_difference_of_independent_shares() -> None:
    # Newcombe 1998, Statistics in Medicine 17:873, table II, (a) and (g), method 10.
    assert difference(56, 70, 48, 80) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert difference(10, 10, 0, 20) == pytest.approx((0.6791, 1.0), abs=5e-5)
    low, high = difference(48, 80, 56, 70)
    assert (-high, -low) == pytest.approx(difference(56, 70, 48, 80))
