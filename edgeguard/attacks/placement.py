"""Where to put the patch of each image: candidates from a gradient, and moves from one place to the next. Needs torch.

The moves follow the idea of Rao et al. 2020 (arXiv:2005.02313): try neighbouring places, keep what raises the loss. The
first guess is ours: with the gradient of the clean image the gain of the best patch at every place is, to first order,
a sum over its window, so all places are ranked at the price of one gradient.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from edgeguard.patch import Positions, grid_positions

NEIGHBOURS = np.array([(-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1)], np.int64)
"""(8, 2): straight moves first."""


def promising_places(clean: torch.Tensor, gradient: torch.Tensor, size: int, stride: int) -> Positions:
    """All places on a grid, those first where a patch can raise the loss most, to first order.

    Args:
        clean: (N, 3, H, W) float32, grey levels. gradient: of the loss, the same shape.
        size: of the patch, in pixels. stride: of the grid, which has P places.

    Returns: (N, P, 2).
    """
    gain = torch.where(gradient > 0, gradient * (255 - clean), -gradient * clean).sum(1, keepdim=True)
    window = F.avg_pool2d(gain, size, 1)[:, 0].cpu().numpy()
    places = grid_positions((clean.shape[2], clean.shape[3]), (size, size), stride)
    order = np.argsort(-window[:, places[:, 0], places[:, 1]], axis=1, kind="stable")
    ranked: Positions = places[order]
    return ranked


def extreme_pixels(gradient: torch.Tensor, size: int, positions: Positions) -> torch.Tensor:
    """Black or white per channel, whichever raises the loss to first order, of the windows at `positions` (N, 2).

    gradient: (N, 3, H, W). Returns: (N, 3, s, s) float32; middle grey where the gradient is zero.
    """
    rows = torch.from_numpy(positions[:, :1] + np.arange(size)).to(gradient.device)
    columns = torch.from_numpy(positions[:, 1:] + np.arange(size)).to(gradient.device)
    image = torch.arange(len(positions), device=gradient.device)[:, None, None]
    window = gradient[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return (127.5 + 127.5 * window.sign()).round()


def neighbours(positions: Positions, stride: int, limit: NDArray[np.int64], directions: int) -> Positions:
    """Places one stride away, within 0 and `limit` (2,). Returns: (directions, N, 2)."""
    moved: Positions = (positions[None] + stride * NEIGHBOURS[:directions, None]).clip(0, limit)
    return moved
