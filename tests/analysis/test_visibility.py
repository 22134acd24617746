"""Opacity, colour difference, and rates that follow from a model that looks at one pixel."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeguard.analysis.visibility import blended, by_opacity, by_size, delta_e
from edgeguard.patch import Patch, square
from edgeguard.verify.harness import Subject

WHITE = square(np.full((3, 4, 4), 255, np.uint8))


def bright(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Class 1 when any pixel is brighter than 200."""
    peak = images.max((1, 2, 3)).astype(np.float32)
    return np.stack([200 - peak, peak - 200], 1)


IMAGES = np.full((10, 3, 8, 8), 50, np.uint8)
SUBJECT = Subject.of(bright, IMAGES, np.zeros(10, np.int64))


def test_opacity_is_a_blend_of_whole_grey_levels() -> None:
    places = np.zeros((10, 2), np.int64)
    assert (blended(IMAGES, WHITE, places, 0.0) == IMAGES).all()
    half = blended(IMAGES, WHITE, places, 0.5)
    assert (half[:, :, :4, :4] == 152).all()
    assert (half[:, :, 4:] == 50).all()


def test_the_rate_jumps_where_the_blend_becomes_bright_enough() -> None:
    rows = by_opacity(SUBJECT, WHITE, (0.0, 0.7, 0.74, 1.0), 0)
    assert [row["asr"] for row in rows] == [0, 0, 1, 1]
    assert rows[0]["delta_e"] == 0
    assert [row["delta_e"] for row in rows] == sorted(row["delta_e"] for row in rows)
    assert all(row["n"] == 10 for row in rows)


def test_sizes() -> None:
    dark = Patch(np.zeros((3, 2, 2), np.uint8), np.ones((2, 2), bool))
    rows = by_size(SUBJECT, {4: WHITE, 2: dark}, 0)
    assert [(row["patch_size"], row["asr"], row["share_of_image"]) for row in rows] == [(2, 0, 1 / 16), (4, 1, 1 / 4)]


def test_colour_differences_of_known_colours() -> None:
    black, white = np.zeros((1, 3), np.uint8), np.full((1, 3), 255, np.uint8)
    red, green = np.array([[255, 0, 0]], np.uint8), np.array([[0, 255, 0]], np.uint8)
    assert delta_e(black, white)[0] == pytest.approx(100, abs=0.01)
    assert delta_e(red, green)[0] == pytest.approx(170.58, abs=0.1)  # CIELAB of the sRGB primaries, D65
    assert delta_e(red, red)[0] == 0
