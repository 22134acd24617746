"""How many images decide a rule, held against trying every number."""

from __future__ import annotations

import itertools

import pytest

from edgeguard.errors import InputError
from edgeguard.statistics import wilson
from edgeguard.verify.advice import advise

SHARES = [(k, n) for n in (1, 7, 40, 100) for k in {0, 1, n // 4, n // 2, n - 1, n} if 0 <= k <= n]
LIMITS = (0.0, 0.05, 0.1, 0.25, 0.3, 0.5, 0.9, 1.0)


def brute_force(k: int, n: int, limit: float, maximum: bool) -> tuple[bool, bool, int | None]:
    """The definition: every number of images in turn, at the same share in whole images, rounded against the outcome."""
    low, high = wilson(k, n)
    if high <= limit if maximum else low >= limit:
        return True, True, None
    if low > limit if maximum else high < limit:
        return False, True, None
    share = k / n
    if share == limit:
        return False, False, None
    passing = share < limit if maximum else share > limit
    for count in itertools.count(1):
        down, up = k * count // n, -(-k * count // n)
        if maximum:
            settled = wilson(up, count)[1] <= limit if passing else wilson(down, count)[0] > limit
        else:
            settled = wilson(down, count)[0] >= limit if passing else wilson(up, count)[1] < limit
        if settled:
            return False, False, count
    raise AssertionError


@pytest.mark.parametrize("maximum", [True, False], ids=["max", "min"])
@pytest.mark.parametrize("limit", LIMITS)
def test_as_by_brute_force(limit: float, maximum: bool) -> None:
    for k, n in SHARES:
        got = advise(k, n, limit, maximum=maximum)
        assert (got.passed, got.decided, got.images) == brute_force(k, n, limit, maximum), (k, n)
        assert got.images is None or got.images > n


def test_known_numbers() -> None:
    """No success at all stays below 5 % from z^2 * 0.95 / 0.05 = 72.99 images on."""
    got = advise(0, 50, 0.05, maximum=True)
    assert (got.passed, got.decided, got.images) == (False, False, 73)
    assert got.sentence == (
        "0.0% of 50 images, interval 0.0% to 7.1%, where at most 5.0% is asked for: at this share 73 images would let it pass"
    )
    assert advise(50, 50, 0.95, maximum=False).images == 73


def test_close_to_the_limit_takes_many_images_and_no_time() -> None:
    got = advise(2999, 10_000, 0.3, maximum=True)
    assert got.images is not None
    assert got.images > 80_000_000
    assert wilson(-(-2999 * got.images // 10_000), got.images)[1] <= 0.3


@pytest.mark.parametrize(
    ("k", "n", "limit", "maximum", "words"),
    [
        (1, 100, 0.3, True, "it passes"),
        (90, 100, 0.3, True, "it fails, and more images will hardly change that"),
        (33, 100, 0.3, True, "it cannot pass, the point estimate itself is beyond the limit; at this share 900 images would"),
        (27, 100, 0.3, False, "where at least 30.0% is asked for: it cannot pass"),
        (30, 100, 0.3, True, "no number of images decides"),
    ],
)
def test_sentences(k: int, n: int, limit: float, maximum: bool, words: str) -> None:
    assert words in advise(k, n, limit, maximum=maximum).sentence


def test_what_is_no_share_is_refused() -> None:
    with pytest.raises(InputError, match="a limit must be a share between 0 and 1, got 30"):
        advise(1, 10, 30, maximum=True)
    for k, n in ((1, 0), (-1, 5), (6, 5)):
        with pytest.raises(InputError, match="a share needs"):
            advise(k, n, 0.3, maximum=True)
