"""How alike two widths are, in what can be differentiated: of their features, and of their input gradients' structure.

`edgeguard.analysis` measures the same of gradients, with hard edges and hard bins; these are the smooth counterparts that
a penalty needs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

CELL, BLOCK, BINS = 4, 2, 9
"""Of the histograms: pixels of a cell's side, cells of a block's side, orientations over half a turn."""
EDGE_SHARE, SOFTNESS = 0.1, 0.25
"""The strongest tenth of the edge magnitudes counts as edges; how softly, in units of an image's mean magnitude."""
TINY = 1e-12


def saliency(gradients: Tensor) -> Tensor:
    """Magnitudes summed over channels and divided by their mean: (N, C, H, W) to (N, 1, H, W), free of scale."""
    total = gradients.abs().sum(1, keepdim=True)
    return total / total.mean((2, 3), keepdim=True).clamp_min(TINY)


def edge_iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of the soft edges of two maps (N, 1, H, W): (N,), in [0, 1]; 1 for equal maps.

    A pixel's edge is a sigmoid of its Sobel magnitude around the limit of the strongest `EDGE_SHARE` of its image.
    """
    a, b = _edges(first), _edges(second)
    return torch.minimum(a, b).sum((1, 2, 3)) / torch.maximum(a, b).sum((1, 2, 3)).clamp_min(TINY)


def hog_cosine(first: Tensor, second: Tensor) -> Tensor:
    """Cosine of the histograms of oriented gradients of two maps (N, 1, H, W): (N,), in [0, 1]."""
    return F.cosine_similarity(hog(first), hog(second), dim=1)


def hog(maps: Tensor) -> Tensor:
    """Histograms of oriented gradients of maps (N, 1, H, W): (N, features), unsigned, in L2 normalized blocks.

    Each gradient counts with its magnitude in the two orientations next to its own. Source: Dalal & Triggs 2005, CVPR.
    """
    down, right = _slopes(maps, torch.tensor([1.0, 0.0, -1.0]), torch.tensor([0.0, 1.0, 0.0]))
    square = right.square() + down.square()
    size = (square + TINY).sqrt()
    # of twice the angle, which is the same for opposite gradients: cosine and sine, times the magnitude.
    along, across = (right.square() - down.square()) / size, 2 * right * down / size
    angles = torch.arange(BINS, device=maps.device) * (2 * math.pi / BINS)
    along, across = along * angles.cos().view(1, -1, 1, 1), across * angles.sin().view(1, -1, 1, 1)
    bins = F.relu(along + across - size * math.cos(2 * math.pi / BINS))
    cells = F.avg_pool2d(bins, tuple(min(CELL, side) for side in maps.shape[2:]))
    kernel = tuple(min(BLOCK, side) for side in cells.shape[2:])
    blocks = F.unfold(cells, kernel)
    normal = blocks / (blocks.square().sum(1, keepdim=True) + TINY).sqrt()
    return normal.flatten(1)


def feature_cosine(first: list[Tensor], second: list[Tensor]) -> Tensor:
    """Cosine of the features (N, ...) of two widths, a mean over layers: (N,)."""
    pairs = zip(first, second, strict=True)
    return torch.stack([F.cosine_similarity(a.flatten(1), b.flatten(1), dim=1) for a, b in pairs]).mean(0)


def _edges(maps: Tensor) -> Tensor:
    """Soft edges (N, 1, H, W) in [0, 1]. The limit itself passes no gradient on."""
    down, right = _slopes(maps, torch.tensor([1.0, 0.0, -1.0]), torch.tensor([1.0, 2.0, 1.0]))
    magnitude = (down.square() + right.square() + TINY).sqrt()
    flat = magnitude.detach().flatten(1)
    count = max(1, round(EDGE_SHARE * flat.shape[1]))
    limit = flat.topk(count, dim=1).values[:, -1].view(-1, 1, 1, 1)
    unit = SOFTNESS * flat.mean(1).clamp_min(TINY).view(-1, 1, 1, 1)
    return torch.sigmoid((magnitude - limit) / unit)


def _slopes(maps: Tensor, difference: Tensor, smooth: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives downwards and to the right, (N, 1, H, W) each, by a 3x3 kernel; the border is repeated outwards."""
    kernel = torch.outer(-difference, smooth).to(maps)
    both = torch.stack([kernel, kernel.T])[:, None]
    slopes = F.conv2d(F.pad(maps, (1, 1, 1, 1), mode="replicate"), both)
    return slopes[:, :1], slopes[:, 1:]
