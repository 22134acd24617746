from __future__ import annotations

import numpy as np

from edgeguard.defences.augment import Crops, crop_and_flip


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def numbered(count: int = 64, side: int = 16) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Images whose red is the column and green the row, both from 1, so that padding is 0."""
    rows, columns = np.indices((side, side)) + 1
    image = np.stack([columns, rows, np.full_like(rows, 7)])
    return np.repeat(image[None], count, 0).astype(np.uint8)


def test_crops_shift_by_at_most_an_eighth_and_pad_with_black() -> None:
    out = crop_and_flip(numbered(400), rng(), flip=False)
    assert out.shape == (400, 3, 16, 16)
    assert out.dtype == np.uint8
    shifts = {(int(image[0, 8, 8]) - 9, int(image[1, 8, 8]) - 9) for image in out}
    assert shifts == {(x, y) for x in range(-2, 3) for y in range(-2, 3)}
    inside = out[:, 2] == 7
    assert (out[:, :2].min(1)[inside] > 0).all()
    assert (out[:, :2][:, :, ~inside.all(0)] >= 0).all()
    assert {int(value) for value in np.unique(out[:, 2])} == {0, 7}


def test_half_of_the_images_are_mirrored_and_none_without_flip() -> None:
    mirrored = crop_and_flip(numbered(400), rng(), flip=True)[:, 0, 8, :]
    falling = int((mirrored[:, 5] > mirrored[:, 6]).sum())
    assert 150 < falling < 250
    plain = crop_and_flip(numbered(400), rng(), flip=False)[:, 0, 8, :]
    assert (plain[:, 5] < plain[:, 6]).all()


def test_equal_generators_give_equal_bytes() -> None:
    images = numbered()
    assert np.array_equal(crop_and_flip(images, rng(3), True), crop_and_flip(images, rng(3), True))
    assert not np.array_equal(crop_and_flip(images, rng(3), True), crop_and_flip(images, rng(4), True))


def test_parts_of_a_batch_get_the_crops_they_have_in_the_whole() -> None:
    images = rng(1).integers(0, 256, (9, 3, 16, 12), np.uint8)
    crops = Crops.draw(9, (16, 12), rng(2), True)
    whole = crops.apply(images)
    assert np.array_equal(whole, crop_and_flip(images, rng(2), True))
    for chosen in (slice(3, 7), np.array([8, 0, 8])):
        assert np.array_equal(crops.cut(chosen).apply(images[chosen]), whole[chosen])
    assert np.array_equal(Crops.whole(9).apply(images), images)
