"""How many images would settle a rule that few images leave open."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from edgeguard.errors import InputError
from edgeguard.statistics import Z95, wilson


@dataclass(frozen=True)
class Advice:
    """What a share says about its limit.

    passed: the unfavourable end of the interval meets the limit, as a gate wants it. decided: the whole interval is on
    one side of the limit. images: how many judged images, all together, would decide if the share stayed as it is; None
    when it is decided or when no number would. sentence: all that in words.
    """

    passed: bool
    decided: bool
    images: int | None
    sentence: str


def advise(successes: int, n: int, limit: float, *, maximum: bool) -> Advice:
    """Whether a share settles a rule and, if not, how many images would.

    Args:
        successes, n: of the judged images.
        limit: of the share.
        maximum: the share may be at most the limit (an ASR); otherwise at least (an accuracy).

    Raises:
        InputError: a limit that is no share, or counts that are none.
    """
    if not 0 <= limit <= 1:
        raise InputError(f"a limit must be a share between 0 and 1, got {limit!r}")
    low, high = wilson(successes, n)
    share = successes / n
    bound = "at most" if maximum else "at least"
    figure = f"{share:.1%} of {n} images, interval {low:.1%} to {high:.1%}, where {bound} {limit:.1%} is asked for"
    if high <= limit if maximum else low >= limit:
        return Advice(True, True, None, f"{figure}: it passes")
    if low > limit if maximum else high < limit:
        return Advice(False, True, None, f"{figure}: it fails, and more images will hardly change that")
    if share == limit:
        return Advice(False, False, None, f"{figure}: the share is the limit itself, which no number of images decides")
    if share > limit if maximum else share < limit:
        images = _smallest(successes, n, limit, upward=maximum, strict=True)
        return Advice(False, False, images, (
            f"{figure}: it cannot pass, the point estimate itself is beyond the limit; at this share {images:,} images "
            "would prove the failure"
        ))  # fmt: skip
    images = _smallest(successes, n, limit, upward=not maximum, strict=False)
    return Advice(False, False, images, f"{figure}: at this share {images:,} images would let it pass")


def _smallest(successes: int, n: int, limit: float, *, upward: bool, strict: bool) -> int:
    """The smallest number of images whose interval, at the same share, is all above the limit (upward) or below it.

    The number of successes is rounded toward the limit. In whole shares the Wilson interval of p leaves a limit L out
    from n = z^2 L (1 - L) / (L - p)^2 on: that is the score test which the interval inverts. Rounding can only add to it,
    and no more than up to the next multiple of the n that was judged.

    Args:
        strict: the interval's end must lie beyond the limit, not on it.
    """
    beyond = _beyond(limit, upward, strict)
    distance = abs(limit - successes / n)
    images = max(1, math.floor(Z95 * Z95 * limit * (1 - limit) / (distance * distance)) - 1)
    while not beyond(_at_share(successes, n, images, upward), images):
        images += 1
    return images


def _at_share(successes: int, n: int, images: int, upward: bool) -> int:
    """Successes among `images`, in integers, rounded toward the limit: down when the interval must rise above it."""
    return successes * images // n if upward else -(-successes * images // n)


def _beyond(limit: float, upward: bool, strict: bool) -> Callable[[int, int], bool]:
    def beyond(successes: int, images: int) -> bool:
        end = wilson(successes, images)[0 if upward else 1]
        if end == limit:
            return not strict
        return end > limit if upward else end < limit

    return beyond
