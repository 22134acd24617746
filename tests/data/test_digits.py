from __future__ import annotations

import numpy as np
import pytest

from edgeguard.data import load_dataset
from edgeguard.data.digits import bilinear
from edgeguard.errors import InputError


def test_the_split_is_fixed_and_stratified() -> None:
    train, test = load_dataset("digits", "train"), load_dataset("digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    assert np.bincount(test.labels).tolist() == [36, 36, 36, 36, 37, 36, 36, 36, 35, 36]
    assert train.image_shape == test.image_shape == (3, 32, 32)
    assert train.class_names == tuple("0123456789")
    assert train.labels.dtype == np.int64
    together = {image.tobytes() for image in train.images(range(len(train)))}
    assert not together & {image.tobytes() for image in test.images(range(len(test)))}


def test_the_pixels_are_always_the_same() -> None:
    assert load_dataset("digits", "train").sha256 == "e8a7e53f24a2805f3603f32476429a6679ba2ed647dc8ad0f52e61c31d8dc0d7"
    images = load_dataset("digits", "test").images([0])
    assert images.dtype == np.uint8
    assert images[0, 0, 16, 8:24].tolist() == ROW
    assert (images[:, 0] == images[:, 1]).all()
    assert (images[:, 0] == images[:, 2]).all()


ROW = [122, 142, 132, 95, 57, 19, 0, 0, 0, 0, 17, 52, 86, 120, 136, 134]


def test_bilinear_by_hand() -> None:
    image = np.array([[[0.0, 8.0], [16.0, 8.0]]])
    wide = bilinear(image, 4)[0]
    assert wide[0].tolist() == [0.0, 2.0, 6.0, 8.0]
    assert wide[:, 0].tolist() == [0.0, 4.0, 12.0, 16.0]
    assert wide[1, 1] == 0.75 * (0.75 * 0 + 0.25 * 8) + 0.25 * (0.75 * 16 + 0.25 * 8)
    np.testing.assert_array_equal(bilinear(image, 2), image)


def test_resized_digits_agree_with_the_originals() -> None:
    small, large = load_dataset("digits", "test", 8), load_dataset("digits", "test", 32)
    assert small.image_shape == (3, 8, 8)
    pixels = small.images([0, 1, 2])
    levels = np.rint(pixels * (16 / 255))
    np.testing.assert_array_equal(pixels, np.rint(levels * 255 / 16))
    means = large.images([0, 1, 2]).reshape(3, 3, 8, 4, 8, 4).mean((3, 5))
    assert np.abs(means - pixels).mean() < 20


@pytest.mark.parametrize("size", [0, 7, 257])
def test_impossible_sizes(size: int) -> None:
    with pytest.raises(InputError, match="resized to 8 to 256 pixels"):
        load_dataset("digits", "train", size)
