"""The moves of Patch-RS: squares, single channels, places, and how large each is at which point. NumPy only.

The schedules of sizes and lengths are the published ones, as shares of the query budget. How often places move is ours:
published is every fifth move, and less often the longer the search lasts, but the place of a small patch decides more
than its pixels do. Ours is the exploration as well: at first, pixels and places are drawn anew instead of changed.
Source: Croce et al. 2022, "Sparse-RS", AAAI 2022, arXiv:2006.12834.
"""

from __future__ import annotations

import math
from bisect import bisect_left

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from edgeguard.patch import Positions

Pixels = NDArray[np.uint8]
"""(n, 3, s, s), every value 0 or 255."""

HALVINGS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.4, 0.8)
"""Shares of the budget after which the area of a square halves."""
EXPLORED = 0.1
"""Share of the budget in which a search per image draws pixels and places anew."""
PLACES_EVERY = (2, 5)
"""One move in so many is one of places, in the first and the second half of the budget."""
REACH = 0.75
"""Longest move of a place at first, as a share of the image; falls linearly to 0."""
STARTING_SQUARES = 32
INITIAL = ("stripes", "squares")


def side_of_square(area: float, size: int, spent: float) -> int:
    """Side in pixels. area: of the first square, a share of the patch's. size: of the patch. spent: share of the budget."""
    return max(1, int(math.sqrt(area / 2 ** bisect_left(HALVINGS, spent)) * size))


def places_turn(iteration: int, spent: float) -> bool:
    """Whether an iteration, from 1, moves places rather than pixels."""
    return iteration % PLACES_EVERY[spent >= 0.5] == 0


def initial_pixels(kind: str, count: int, size: int, rng: np.random.Generator) -> Pixels:
    """`count` patches: vertical stripes of random colours, or random squares on top of those."""
    pixels: Pixels = np.repeat(_colours((count, 3, 1, size), rng), size, 2)
    if kind == "squares":
        for side in rng.integers(1, max(1, size // 2) + 1, STARTING_SQUARES):
            _paint(pixels, int(side), rng)
    return pixels


def change_pixels(pixels: Pixels, side: int, rng: np.random.Generator) -> Pixels:
    """Copies in which one square each has another random colour; a square of one pixel flips in one channel."""
    changed: Pixels = pixels.copy()
    if side > 1:
        _paint(changed, side, rng)
        return changed
    count, channels, size, _ = pixels.shape
    row, column = rng.integers(0, size, (2, count))
    where = np.arange(count), rng.integers(0, channels, count), row, column
    changed[where] = 255 - changed[where]
    return changed


def change_places(
    places: Positions, image: tuple[int, int], size: int, spent: float, rng: np.random.Generator
) -> Positions:
    """Copies moved by a random step each, kept inside the image (H, W); its longest step falls to one pixel."""
    reach = np.maximum(1, (REACH * (1 - spent) * np.array(image)).astype(np.int64))
    moved: Positions = np.clip(places + rng.integers(-reach, reach + 1, places.shape), 0, np.array(image) - size)
    return moved


def carry_pixels(pixels: Pixels, step: Positions) -> Pixels:
    """Copies rolled against the step (n, 2) of their place: where old and new place overlap, the image stays the same."""
    count, _, size, _ = pixels.shape
    index = (np.arange(size) + step[:, :, None]) % size  # (n, 2, s)
    rows, columns = index[:, 0, :, None], index[:, 1, None, :]
    carried: Pixels = pixels[np.arange(count)[:, None, None], :, rows, columns].transpose(0, 3, 1, 2)
    return carried


def _paint(pixels: Pixels, side: int, rng: np.random.Generator) -> None:
    """Paint one square of a random colour at a random place of each patch, in place."""
    count, channels, size, _ = pixels.shape
    row, column = rng.integers(0, size - side + 1, (2, count))
    windows = sliding_window_view(pixels, (side, side), axis=(2, 3), writeable=True)
    windows[np.arange(count), :, row, column] = _colours((count, channels, 1, 1), rng)


def _colours(shape: tuple[int, ...], rng: np.random.Generator) -> Pixels:
    colours: Pixels = 255 * rng.integers(0, 2, shape, dtype=np.uint8)
    return colours
