from __future__ import annotations

import numpy as np
import pytest
import torch

from edgeguard.attacks.per_image import PerImage, craft_per_image, vanished_gradients
from edgeguard.errors import InputError

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 3, 5, 5), dtype=np.uint8)
LABELS = np.array([0, 1, 0, 1, 0, 1])
WEIGHT = torch.randn(75, generator=torch.Generator().manual_seed(2)) / 100


def model(images: torch.Tensor) -> torch.Tensor:
    score = images.flatten(1) @ WEIGHT
    return torch.stack([-score, score], 1)


def test_every_image_gets_its_own_optimum() -> None:
    positions = np.array([[0, 0], [1, 2], [3, 3], [2, 1], [0, 3], [3, 0]])
    pixels = craft_per_image(PerImage(2, steps=30), model, IMAGES, LABELS, positions)
    weight = WEIGHT.reshape(3, 5, 5).numpy()
    for patch, label, (row, column) in zip(pixels, LABELS, positions, strict=True):
        under = weight[:, row : row + 2, column : column + 2] * (1 if label == 0 else -1)
        assert np.array_equal(patch, np.where(under > 0, 255, 0))


def test_targeted() -> None:
    positions = np.zeros((6, 2), np.int64)
    pixels = craft_per_image(PerImage(5, target=1), model, IMAGES, LABELS, positions)
    assert (pixels == np.where(WEIGHT.reshape(3, 5, 5).numpy() > 0, 255, 0)).all()


def test_vanished_gradients_are_found() -> None:
    def dead_for_dark(images: torch.Tensor) -> torch.Tensor:
        return model(images) * (images.mean((1, 2, 3), keepdim=True)[:, :, 0, 0] > 10)

    images = IMAGES.copy()
    images[:2] = 0
    gone = vanished_gradients(dead_for_dark, images, LABELS, "margin")
    assert gone.tolist() == [True, True, False, False, False, False]
    assert vanished_gradients(lambda x: model(x) * torch.inf, images, LABELS, "margin").all()


@pytest.mark.parametrize("change", [{"patch_size": 0}, {"steps": 0}, {"step_size": 0.0}, {"seed": -1}, {"loss": "mse"}])
def test_bad_configurations(change: dict[str, object]) -> None:
    with pytest.raises(InputError):
        PerImage(**{"patch_size": 2, **change})  # type: ignore[arg-type]


def test_a_patch_larger_than_the_image() -> None:
    with pytest.raises(InputError, match="larger than the image"):
        craft_per_image(PerImage(6), model, IMAGES, LABELS, np.zeros((6, 2), np.int64))
