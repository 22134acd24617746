from __future__ import annotations

import numpy as np
import pytest

from edgeguard.certify import MaskSet
from edgeguard.errors import InputError

BLACK = (0, 0, 0)


def covers_everything(masks: MaskSet, patch: tuple[int, int]) -> bool:
    """Whether some mask hides the whole patch, for every place of it; by trying them all."""
    height, width = patch
    windows = np.lib.stride_tricks.sliding_window_view(masks.hidden, patch, axis=(1, 2))  # (masks, rows, columns, h, w)
    assert windows.shape[1:3] == (masks.image[0] - height + 1, masks.image[1] - width + 1)
    return bool(windows.all((3, 4)).any(0).all())


def test_every_place_of_every_patch_is_covered() -> None:
    made = 0
    for side in range(3, 17):
        for patch in range(1, side):
            for per_axis in range(2, 8):
                if patch + -(-(side - patch + 1) // per_axis) - 1 >= side:
                    continue
                masks = MaskSet.of((side, side), (patch, patch), per_axis)
                assert len(masks) <= per_axis**2
                assert covers_everything(masks, (patch, patch)), (side, patch, per_axis)
                made += 1
    assert made > 400


@pytest.mark.parametrize("patch", [(5, 5), (3, 9), (9, 3), (1, 12)])
def test_rectangles_and_all_smaller_patches_are_covered(patch: tuple[int, int]) -> None:
    masks = MaskSet.of((18, 24), patch, 4)
    for height in range(1, patch[0] + 1):
        for width in range(1, patch[1] + 1):
            assert covers_everything(masks, (height, width))
    assert not covers_everything(masks, (masks.size[0] + 1, masks.size[1]))


def test_the_published_sizes() -> None:
    """CIFAR-10, 5x5, six masks an axis: stride ceil(28 / 6) = 5, masks of 5 + 5 - 1 pixels."""
    masks = MaskSet.of((32, 32), (5, 5), 6)
    assert (len(masks), masks.size) == (36, (9, 9))
    assert masks.starts == ((0, 5, 10, 15, 20, 23),) * 2
    assert masks.hidden.sum((1, 2)).tolist() == [81] * 36


def test_masks_paint_one_colour_and_leave_the_rest() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 3, 10, 12), np.uint8)
    masks = MaskSet.of((10, 12), (2, 3), 3, (9, 8, 7))
    first, second = rng.integers(0, len(masks), (2, 4))
    for painted, numbers in (
        (masks.apply(images, first), [first]),
        (masks.apply(images, first, second), [first, second]),
    ):
        assert painted.dtype == np.uint8
        for row in range(4):
            hidden = np.logical_or.reduce([masks.hidden[number[row]] for number in numbers])
            assert (painted[row][:, ~hidden] == images[row][:, ~hidden]).all()
            assert (painted[row][:, hidden] == np.array([9, 8, 7])[:, None]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((8, 8), (9, 3), 2), "larger than the image"),
        (((8, 8), (0, 3), 2), "at least 1"),
        (((8, 8), (3, 3), 0), "at least 1"),
        (((8, 8), (8, 8), 4), "whole image"),
        (((8, 8), (3, 3), 1), "whole image"),
        (((8, 8), (3, 3), 3, (0, 0, 256)), "0 to 255"),
    ],
)
def test_impossible_sets(arguments: tuple[tuple[int, int], tuple[int, int], int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MaskSet.of(*arguments)


def test_a_set_with_a_hole_is_refused() -> None:
    good = MaskSet.of((8, 8), (2, 2), 3)
    assert good.starts[0] == (0, 3, 4)
    with pytest.raises(InputError, match="begins at pixel 3"):
        MaskSet(good.image, good.patch, good.size, ((0, 4), good.starts[1]))
    with pytest.raises(InputError, match="do not lie inside"):
        MaskSet(good.image, good.patch, good.size, ((0, 3, 5), good.starts[1]))
