"""Intervals and tests for shares of images. Standard library only.

Every function takes counts and returns floats between 0 and 1 (differences: between -1 and 1).
"""

from __future__ import annotations

import math

from edgeguard.errors import InputError

Z95 = 1.959963984540054
"""The 97.5 % quantile of the normal distribution."""


def wilson(successes: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Score interval of a share, 95 % by default.

    Source: Wilson 1927, J. Am. Stat. Assoc. 22:209; no continuity correction.

    Raises:
        InputError: unless 0 <= successes <= n and n >= 1.
    """
    if n < 1 or not 0 <= successes <= n:
        raise InputError(f"a share needs 0 <= successes <= n and n >= 1, got {successes} of {n}")
    share = successes / n
    denominator = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / denominator
    half = z / denominator * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p-value of McNemar's exact test: are the two kinds of discordant pairs equally likely?

    Twice the smaller tail of a binomial with one half, at most 1. Source: McNemar 1947, Psychometrika 12:153, in the
    exact form of Fleiss, Levin & Paik, Statistical Methods for Rates and Proportions, section 13.1.

    Args:
        only_first: pairs in which only the first of the two succeeded.
        only_second: pairs in which only the second did.
    """
    if only_first < 0 or only_second < 0:
        raise InputError(f"counts of pairs cannot be negative, got {only_first} and {only_second}")
    n = only_first + only_second
    if n == 0:
        return 1.0
    log_half = n * math.log(0.5)
    tail = sum(math.exp(_log_choose(n, k) + log_half) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def paired_difference(both: int, only_first: int, only_second: int, neither: int) -> tuple[float, float]:
    """95 % interval of the first share minus the second, measured on the same n pairs.

    Wilson intervals of both shares, combined by the square-and-add rule with the correlation of the pairs.
    Source: Newcombe 1998, Statistics in Medicine 17:2635, method 10 (continuity correction on phi only).

    Raises:
        InputError: negative counts or no pairs.
    """
    counts = (both, only_first, only_second, neither)
    n = sum(counts)
    if min(counts) < 0 or n < 1:
        raise InputError(f"a paired comparison needs counts >= 0 of at least one pair, got {counts}")
    first, second = both + only_first, both + only_second
    low1, high1 = wilson(first, n)
    low2, high2 = wilson(second, n)
    share1, share2 = first / n, second / n
    phi = _phi(*counts)
    down1, up1, down2, up2 = share1 - low1, high1 - share1, share2 - low2, high2 - share2
    delta = (only_first - only_second) / n
    down = math.sqrt(max(0.0, down1 * down1 - 2 * phi * down1 * up2 + up2 * up2))
    up = math.sqrt(max(0.0, up1 * up1 - 2 * phi * up1 * down2 + down2 * down2))
    return max(-1.0, delta - down), min(1.0, delta + up)


def _phi(both: int, only_first: int, only_second: int, neither: int) -> float:
    """Correlation of the pairs, its numerator shrunk by n/2 where positive (Newcombe's method 10)."""
    n = both + only_first + only_second + neither
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    if margins == 0:
        return 0.0
    numerator = float(both * neither - only_first * only_second)
    if numerator > 0:
        numerator = max(0.0, numerator - n / 2)
    return numerator / math.sqrt(margins)


def difference(first: int, first_n: int, second: int, second_n: int) -> tuple[float, float]:
    """95 % interval of the first share minus the second, measured on independent images.

    Wilson intervals of both shares, combined by the square-and-add rule.
    Source: Newcombe 1998, Statistics in Medicine 17:873, method 10.
    """
    low1, high1 = wilson(first, first_n)
    low2, high2 = wilson(second, second_n)
    share1, share2 = first / first_n, second / second_n
    delta = share1 - share2
    down, up = math.hypot(share1 - low1, high2 - share2), math.hypot(high1 - share1, share2 - low2)
    return max(-1.0, delta - down), min(1.0, delta + up)
