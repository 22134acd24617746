"""Models whose optimal patch is known, and images for them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from edgeguard.attacks.api import Differentiable, Victim

SIDE = 12
IMAGES = np.random.default_rng(0).integers(0, 256, (12, 3, SIDE, SIDE), dtype=np.uint8)
LABELS = np.zeros(12, np.int64)


def linear(weight: NDArray[np.float64], bias: float) -> Differentiable:
    """Two classes; class 1 gains `weight` (3, H, W) per grey level, class 0 starts `bias` ahead."""
    matrix = torch.from_numpy(weight.astype(np.float32)).flatten()

    def model(images: torch.Tensor) -> torch.Tensor:
        score = images.flatten(1) @ matrix - bias
        return torch.stack([-score, score], 1)

    return model


def by_channel(*gains: float, bias: float = 0.0) -> Differentiable:
    """A model to which the place of a pixel does not matter."""
    return linear(np.broadcast_to(np.array(gains)[:, None, None], (3, SIDE, SIDE)), bias)


def window(row: int, column: int, size: int, gain: float, bias: float) -> Differentiable:
    """A model that looks at the red of one window alone."""
    weight = np.zeros((3, SIDE, SIDE))
    weight[0, row : row + size, column : column + size] = gain
    return linear(weight, bias)


def network(seed: int = 0, side: int = SIDE) -> torch.nn.Module:
    """A small random net of three classes, sharp enough for its losses to differ."""
    torch.manual_seed(seed)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(4 * (side - 2) ** 2, 3)
    )
    with torch.no_grad():
        net[0].weight.mul_(0.05)
        net[3].weight.mul_(5.0)
    return net.eval()


def of(*models: Differentiable) -> Victim:
    return Victim({str(number): model for number, model in enumerate(models)})
