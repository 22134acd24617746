"""The numbers of a QDQ file, chosen so that rounding in float32 decides as the integers do."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from edgeguard import graph as g
from edgeguard.inttype import IntType

FLOAT_ERROR = 2.0**-22
"""Relative error of a multiplication by a rounded constant and an addition in float32, whatever their order."""


def file_scale(scale: float) -> float:
    """The power of two that stands for a tensor's scale in the file: the largest that is not above it."""
    return math.ldexp(1.0, math.frexp(scale)[1] - 1)


def is_robust(node: g.Quantize, dtype: IntType) -> bool:
    """Whether every pixel value is so far from a rounding tie that one float multiplication and addition decide it."""
    pixels = np.arange(256, dtype=np.float64)[:, None] / node.scale.astype(np.float64)
    position = pixels + node.zero_point
    distance = np.abs(position - np.floor(position) - 0.5)
    error = FLOAT_ERROR * (pixels + np.abs(node.zero_point))
    saturated = (position < dtype.qmin - 1) | (position > dtype.qmax + 1)
    return bool((saturated | (distance > error)).all() and (error[~saturated] < 0.5).all())


def bias_shift(multiplier: NDArray[np.float32], dtype: IntType, bound: int) -> NDArray[np.float64]:
    """Fractions of an accumulator step that, added to the biases, keep accumulators away from rounding ties.

    Where an output changes from k to k + 1, some accumulator A is the first that `round_half_even(float32(A) * m)` takes
    to k + 1. Any shift with (A - 1 + shift) * m < k + 0.5 < (A + shift) * m gives the same integers, however the float
    sum is ordered; of those that satisfy all k, the middle is the farthest from every tie. Zero where none does.

    Args:
        multiplier: (O,) float32, m of each channel.
        dtype: of the output.
        bound: largest magnitude of an accumulator.

    Returns:
        (O,) float64 within -1 and 1.
    """
    ties = np.arange(dtype.qmin, dtype.qmax) + 0.5
    exact = ties / multiplier.astype(np.float64)[:, None]
    near = np.floor(exact)[..., None] + np.arange(-1, 3)
    above = np.rint(near.astype(np.float32) * multiplier[:, None, None]) > ties[:, None]
    first = np.take_along_axis(near, above.argmax(2)[..., None], 2)[..., 0]
    matters = above.any(2) & (np.abs(exact) <= bound + 1)
    low = np.where(matters, exact - first, -np.inf).max(1)
    high = np.where(matters, exact - first, np.inf).min(1) + 1
    found = np.isfinite(low) & (low < high)
    return np.where(found, (np.where(found, low, 0) + np.where(found, high, 0)) / 2, 0.0)
