"""How alike are the input gradients of one model at two widths? Needs torch.

A patch that is crafted at one width works at another when their gradients point alike, or at least when they are strong
at the same places. Three measures, each per image: the cosine of the gradients themselves, the cosine of histograms of
oriented gradients of their saliency (which forgives small shifts), and the overlap of their strongest edges.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgeguard.attacks.api import Differentiable
from edgeguard.attacks.losses import get_loss

Array = NDArray[np.float64]
BATCH = 100
LOSS = "scaled-cross-entropy"
CELL, BLOCK, BINS = 4, 2, 9
"""Of the histograms: pixels of a cell's side, cells of a block's side, orientations over half a turn."""
EDGE_SHARE = 0.1
"""The strongest tenth of the edge magnitudes counts as edges."""
RESAMPLES = 2000


def input_gradients(model: Differentiable, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> NDArray[np.float32]:
    """Gradient of the scaled cross-entropy by the pixels, (N, 3, H, W) float32."""
    found = []
    for start in range(0, len(images), BATCH):
        leaf = torch.from_numpy(images[start : start + BATCH]).float().requires_grad_()
        truth = torch.from_numpy(labels[start : start + BATCH])
        (gradient,) = torch.autograd.grad(get_loss(LOSS)(model(leaf), truth, None).sum(), leaf)
        found.append(gradient.numpy())
    return np.concatenate(found)


def compare(first: NDArray[np.float32], second: NDArray[np.float32], seed: int) -> dict[str, Any]:
    """The three measures of two sets of gradients (N, 3, H, W): mean, 95 % bootstrap interval over images, and n.

    Images whose gradient is zero in one of the sets have no direction; they are left out, and n says so.
    """
    alive = (np.abs(first).max((1, 2, 3)) > 0) & (np.abs(second).max((1, 2, 3)) > 0)
    if not alive.any():
        return {name: summary(np.zeros(0), seed) for name in ("cosine", "hog_cosine", "edge_iou")}
    a, b = first[alive].astype(np.float64), second[alive].astype(np.float64)
    maps = saliency(a), saliency(b)
    measures = {
        "cosine": _cosines(a.reshape(len(a), -1), b.reshape(len(b), -1)),
        "hog_cosine": _cosines(*(np.stack([hog(one) for one in each]) for each in maps)),
        "edge_iou": np.array([edge_iou(x, y) for x, y in zip(*maps, strict=True)]),
    }
    return {name: summary(values, seed) for name, values in measures.items()}


def summary(values: Array, seed: int) -> dict[str, Any]:
    """Mean of (N,) with its 95 % percentile bootstrap interval; None where there are no values."""
    if not len(values):
        return {"mean": None, "ci95": None, "n": 0}
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (RESAMPLES, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {"mean": float(values.mean()), "ci95": [float(low), float(high)], "n": len(values)}


def saliency(gradients: Array) -> Array:
    """Sum of the magnitudes over channels: (N, 3, H, W) to (N, H, W)."""
    total: Array = np.abs(gradients).sum(1)
    return total


def hog(image: Array) -> Array:
    """Histogram of oriented gradients of (H, W), flat. Source: Dalal & Triggs 2005, CVPR; unsigned, L2 normalized blocks.

    Rows and columns that do not fill a cell are left out.
    """
    down, right = np.gradient(image)
    magnitude, angle = np.hypot(down, right), np.arctan2(down, right) % np.pi
    rows, columns = (max(1, side // CELL) for side in image.shape)
    index = np.minimum((angle / np.pi * BINS).astype(int), BINS - 1)
    cells = np.zeros((rows, columns, BINS))
    height, width = min(rows * CELL, image.shape[0]), min(columns * CELL, image.shape[1])
    y, x = np.meshgrid(np.arange(height) // CELL, np.arange(width) // CELL, indexing="ij")
    y, x = np.minimum(y, rows - 1), np.minimum(x, columns - 1)
    np.add.at(cells, (y, x, index[:height, :width]), magnitude[:height, :width])
    blocks = []
    for row in range(max(1, rows - BLOCK + 1)):
        for column in range(max(1, columns - BLOCK + 1)):
            block = cells[row : row + BLOCK, column : column + BLOCK].ravel()
            blocks.append(block / max(float(np.linalg.norm(block)), 1e-12))
    return np.concatenate(blocks)


def edge_iou(first: Array, second: Array) -> float:
    """Intersection over union of the strongest edges of two maps (H, W): Sobel magnitudes in their top `EDGE_SHARE`."""
    a, b = (_edges(each) for each in (first, second))
    return float((a & b).sum() / max(1, (a | b).sum()))


def _edges(image: Array) -> NDArray[np.bool_]:
    padded = np.pad(image, 1, mode="edge")
    smooth_rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    smooth_columns = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    magnitude = np.hypot(smooth_rows[:, 2:] - smooth_rows[:, :-2], smooth_columns[2:] - smooth_columns[:-2])
    count = max(1, round(EDGE_SHARE * magnitude.size))
    limit = np.partition(magnitude.ravel(), -count)[-count]
    edges: NDArray[np.bool_] = (magnitude >= limit) & (magnitude > 0)
    return edges


def _cosines(first: Array, second: Array) -> Array:
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    result: Array = (first * second).sum(1) / np.maximum(norms, 1e-300)
    return result
