from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from edgeguard.attacks.gap import disc
from edgeguard.attacks.transforms import Transforms, paste
from edgeguard.errors import InputError
from edgeguard.patch import apply_patch

IMAGES = torch.randint(0, 256, (6, 3, 20, 20), generator=torch.Generator().manual_seed(0)).float()
PIXELS = torch.randint(0, 256, (3, 8, 8), generator=torch.Generator().manual_seed(1)).float()
MASK = np.ones((8, 8), bool)
PLACES = np.array([[6, 6], [0, 0], [12, 12], [3, 9], [5, 1], [0, 12]])


def pasted(pixels: torch.Tensor, images: torch.Tensor = IMAGES, mask: Any = MASK, **strength: float) -> torch.Tensor:
    return paste(images, pixels, mask, PLACES, Transforms(**strength), np.random.default_rng(0))


def test_off_is_a_plain_paste() -> None:
    rng = np.random.default_rng(0)
    out = paste(IMAGES, PIXELS, MASK, PLACES, Transforms(), rng)
    assert torch.equal(out, apply_patch(IMAGES, PIXELS, MASK, PLACES))
    assert rng.integers(1 << 30) == np.random.default_rng(0).integers(1 << 30)


@pytest.mark.parametrize("name", ["rotation_degrees", "scale", "brightness", "contrast", "noise"])
@pytest.mark.parametrize("mask", [MASK, disc(8)])
def test_next_to_nothing_is_a_plain_paste(name: str, mask: Any) -> None:
    plain = apply_patch(IMAGES, PIXELS, mask, PLACES)
    assert torch.equal(pasted(PIXELS, mask=mask, **{name: 1e-5}), plain)
    strong = pasted(PIXELS, mask=mask, **{name: 0.5 if name in ("scale", "contrast") else 20.0})
    assert (strong - plain).abs().max() > 2
    assert torch.equal(strong, strong.round())


def test_one_patch_for_each_image() -> None:
    each = torch.stack([PIXELS.roll(k, 1) for k in range(6)])
    out = pasted(each, rotation_degrees=1e-5)
    assert torch.equal(out, apply_patch(IMAGES, each, MASK, PLACES))


def test_rotation_turns_mask_and_pixels_and_keeps_the_area() -> None:
    white, black = torch.full((3, 8, 8), 255.0), torch.zeros(6, 3, 20, 20)
    cover = pasted(white, black, rotation_degrees=45)[0] / 255
    assert float(cover[0].sum()) == pytest.approx(64, rel=0.1)
    assert (cover > 0).sum() > 3 * 64
    half = white.clone()
    half[:, :, 4:] = 0
    turned = paste(black, half, MASK, PLACES, Transforms(rotation_degrees=180), np.random.default_rng(0))
    assert len({tuple((image > 128).sum((0, 1)).tolist()) for image in turned}) == 6


def test_scale_changes_the_area_about_the_centre() -> None:
    white, black = torch.full((3, 8, 8), 255.0), torch.zeros(6, 3, 20, 20)
    cover = pasted(white, black, scale=0.5)[0, 0] / 255
    side = float(cover.sum()) ** 0.5
    assert 4 <= side <= 12
    assert abs(side - 8) > 0.2
    rows = (cover.sum(1) * torch.arange(20)).sum() / cover.sum()
    assert float(rows) == pytest.approx(9.5, abs=0.01)


def test_light_and_noise() -> None:
    grey = torch.full((3, 8, 8), 100.0)
    black = torch.zeros(6, 3, 20, 20)
    inside = [pasted(grey, black, **{name: value})[0, :, 6:14, 6:14] for name, value in
              (("brightness", 30.0), ("contrast", 0.5), ("noise", 9.0))]  # fmt: skip
    assert inside[0].std() < 1e-3
    assert 1 < abs(float(inside[0].mean()) - 100) <= 30
    assert inside[1].std() < 1e-3
    assert 0.1 < abs(float(inside[1].mean()) - 100) <= 0.5 * 27.5
    assert float(inside[2].std()) == pytest.approx(9, rel=0.25)
    bright = pasted(torch.full((3, 8, 8), 250.0), black, noise=40.0)
    assert 0 <= bright.min() <= bright.max() <= 255


def test_gradients_reach_what_the_mask_covers_and_nothing_else() -> None:
    mask = disc(8)
    leaf = PIXELS.clone().requires_grad_()
    out = pasted(leaf, mask=mask, rotation_degrees=30, scale=0.2, contrast=0.2)
    (gradient,) = torch.autograd.grad(out.sum(), leaf)
    assert (gradient[:, mask] != 0).all()
    assert (gradient[:, ~mask] == 0).all()


@pytest.mark.parametrize("name", ["rotation_degrees", "scale", "brightness", "contrast", "noise"])
def test_bad_strengths(name: str) -> None:
    for value in (-1.0, 1e4, float("nan")):
        with pytest.raises(InputError, match=name):
            Transforms(**{name: value})
