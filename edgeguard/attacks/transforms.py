"""Expectation over transformations: a patch as a camera might see it, differentiably. Needs torch.

For patches that are to survive printing and viewing; the harness judges plain pastes only. Mask and pixels are turned
and scaled together about the patch's centre, bilinearly, and what would reach over the image's border is cut off.
Source of the idea: Athalye et al. 2018, arXiv:1707.07397. Its ranges there are for objects; ours are options.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from edgeguard.errors import InputError
from edgeguard.patch import Positions, apply_patch


@dataclass(frozen=True)
class Transforms:
    """How strongly a patch is changed, each 0 for not at all; drawn anew for every image and step, uniformly.

    rotation_degrees: at most, either way. scale: at most, as a factor of 1 - scale to 1 + scale. brightness: at most,
    in grey levels either way. contrast: at most, as a factor of 1 - contrast to 1 + contrast about middle grey.
    noise: standard deviation of Gaussian noise on every pixel, in grey levels.
    """

    rotation_degrees: float = 0.0
    scale: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        limits = {"rotation_degrees": 180.0, "scale": 0.9, "brightness": 255.0, "contrast": 1.0, "noise": 255.0}
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value <= limits[field.name]:
                raise InputError(f"{field.name} must be between 0 and {limits[field.name]:g}, got {value}")

    @property
    def active(self) -> bool:
        return any(getattr(self, field.name) for field in fields(self))


PLAIN = Transforms()
"""No transform: a plain paste."""


def paste(
    images: torch.Tensor,
    pixels: torch.Tensor,
    mask: NDArray[np.bool_],
    positions: Positions,
    transforms: Transforms,
    rng: np.random.Generator,
) -> torch.Tensor:
    """Copy of `images` with a transformed patch on each; exactly `apply_patch` where no transform is active.

    Args:
        images: (N, 3, H, W) float32, grey levels. pixels: (3, h, w) or (N, 3, h, w) float32.
        mask: (h, w) bool. positions: (N, 2) of the top left corner that the patch has without transforms.

    Returns: (N, 3, H, W), with gradients to `pixels`; transformed, in whole grey levels, as a camera gives them.
    """
    if not transforms.active:
        return apply_patch(images, pixels, mask, positions)
    count = len(images)
    cover = torch.from_numpy(mask).to(images)[None]
    stacked = torch.cat([pixels * cover, cover.expand(*pixels.shape[:-3], 1, *mask.shape)], -3)
    stacked = stacked.expand(count, -1, -1, -1) if pixels.ndim == 3 else stacked
    grid = _grid(mask.shape, (images.shape[2], images.shape[3]), positions, transforms, rng).to(images)
    # Colours travel multiplied by their mask, so that a soft border mixes patch and image, and not patch and black.
    warped = F.grid_sample(stacked, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    colours, alpha = warped[:, :3], warped[:, 3:]
    gain = _uniform(rng, count, transforms.contrast).to(images) + 1
    shift = _uniform(rng, count, transforms.brightness).to(images) + 127.5 * (1 - gain)
    colours = gain * colours + shift * alpha
    if transforms.noise:
        grain = torch.from_numpy(rng.standard_normal(tuple(colours.shape), np.float32)).to(images)
        colours = colours + transforms.noise * grain * alpha
    colours = torch.minimum(colours.clamp_min(0), 255 * alpha)
    seen = images * (1 - alpha) + colours
    return seen + (seen.round() - seen).detach()  # exactly whole grey levels, with the gradient of what was rounded


def _uniform(rng: np.random.Generator, count: int, most: float) -> torch.Tensor:
    """(N, 1, 1, 1) float32 between -most and most."""
    return torch.from_numpy(rng.uniform(-most, most, (count, 1, 1, 1)).astype(np.float32))


def _grid(
    patch: tuple[int, ...], image: tuple[int, int], positions: Positions, transforms: Transforms,
    rng: np.random.Generator,
) -> torch.Tensor:  # fmt: skip
    """(N, H, W, 2): where in the patch, from -1 to 1, each pixel of the image comes from."""
    count = len(positions)
    angle = rng.uniform(-1, 1, (count, 1, 1)) * math.radians(transforms.rotation_degrees)
    factor = 1 + rng.uniform(-1, 1, (count, 1, 1)) * transforms.scale
    rows = np.arange(image[0])[None, :, None] + 0.5 - (positions[:, 0, None, None] + patch[0] / 2)
    columns = np.arange(image[1])[None, None, :] + 0.5 - (positions[:, 1, None, None] + patch[1] / 2)
    down = (np.cos(angle) * rows - np.sin(angle) * columns) / factor
    across = (np.sin(angle) * rows + np.cos(angle) * columns) / factor
    grid = np.stack([2 * across / patch[1], 2 * down / patch[0]], -1)
    return torch.from_numpy(grid.astype(np.float32))
