"""One patch for each image, at a given place: what gradients can do without universality. Needs torch.

Signed steps on the loss of each image alone, keeping the iterate at which the model's own answer was worst.
Source: Karmon et al. 2018, arXiv:1801.02608 (LaVAN), with signed steps as in Madry et al. 2018, arXiv:1706.06083.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from edgeguard.attacks.api import Differentiable
from edgeguard.attacks.losses import get_loss, margin
from edgeguard.errors import InputError
from edgeguard.patch import Positions, apply_patch, check_fits


@dataclass(frozen=True)
class PerImage:
    """patch_size: side length in pixels. step_size: in grey levels, falls to 1. target: a class; None is untargeted."""

    patch_size: int
    steps: int = 40
    step_size: float = 24.0
    loss: str = "scaled-cross-entropy"
    target: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        get_loss(self.loss)
        if self.patch_size < 1 or self.steps < 1 or not 1 <= self.step_size <= 255 or self.seed < 0:
            raise InputError(
                "expected patch_size >= 1, steps >= 1, 1 <= step_size <= 255 and seed >= 0, got "
                f"{self.patch_size}, {self.steps}, {self.step_size} and {self.seed}"
            )


def craft_per_image(
    config: PerImage,
    model: Differentiable,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    positions: Positions,
    device: str = "cpu",
) -> NDArray[np.uint8]:
    """Search for one patch per image.

    Args:
        images: (N, 3, H, W) uint8, in one batch. labels: (N,) int64. positions: (N, 2), where each patch will be.

    Returns: (N, 3, s, s) uint8.
    """
    size = config.patch_size
    check_fits((size, size), (images.shape[2], images.shape[3]))
    loss, mask = get_loss(config.loss), np.ones((size, size), bool)
    rng = np.random.default_rng(config.seed)
    start = rng.integers(0, 256, (len(images), 3, size, size)).astype(np.float32)
    patch = torch.from_numpy(start).to(device)
    clean = torch.from_numpy(images).to(device).float()
    truth = torch.from_numpy(labels).to(device)
    best, best_margin = patch.clone(), torch.full((len(images),), -torch.inf, device=device)
    for step in range(config.steps + 1):
        leaf = patch.round().requires_grad_()
        logits = model(apply_patch(clean, leaf, mask, positions))
        reached = margin(logits.detach(), truth, config.target)
        better = reached > best_margin
        best[better], best_margin[better] = leaf.detach()[better], reached[better]
        if step == config.steps:
            break
        (gradient,) = torch.autograd.grad(loss(logits, truth, config.target).sum(), leaf)
        size_now = 1 + (config.step_size - 1) * (1 - step / config.steps)
        patch = (patch + size_now * gradient.sign()).clamp(0, 255)
    pixels: NDArray[np.uint8] = best.to(torch.uint8).cpu().numpy()
    return pixels


def vanished_gradients(
    model: Differentiable, images: NDArray[np.uint8], labels: NDArray[np.int64], loss: str, device: str = "cpu"
) -> NDArray[np.bool_]:
    """Which images (N,) have an input gradient of the loss that is zero everywhere, or not finite somewhere."""
    leaf = torch.from_numpy(images).to(device).float().requires_grad_()
    value = get_loss(loss)(model(leaf), torch.from_numpy(labels).to(device), None).sum()
    (gradient,) = torch.autograd.grad(value, leaf)
    flat = gradient.flatten(1)
    gone: NDArray[np.bool_] = ((flat == 0).all(1) | ~torch.isfinite(flat).all(1)).cpu().numpy()
    return gone
