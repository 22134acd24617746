"""Training images that lie on the device and are cropped there, so that a batch costs the host a few indices."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeguard.data import Dataset
from edgeguard.defences.augment import Crops

SHARE = 0.25
"""Of a GPU's free memory that the images of a data set may take."""
CHUNK = 4096
"""Images read at once, so that the host needs no room for all of them."""


class ResidentImages:
    """All images of a data set, on a device."""

    def __init__(self, dataset: Dataset, device: torch.device) -> None:
        channels, height, width = dataset.image_shape
        self._pixels = torch.empty((len(dataset), height, width, channels), dtype=torch.uint8, device=device)
        for start in range(0, len(dataset), CHUNK):
            chosen = np.arange(start, min(start + CHUNK, len(dataset)))
            self._pixels[start : start + CHUNK] = torch.from_numpy(dataset.images(chosen)).to(device).permute(0, 2, 3, 1)

    def cropped(self, indices: NDArray[np.int64], crops: Crops) -> Tensor:
        """What `Crops.apply` makes of the images at `indices` (n,): (n, 3, H, W) uint8, channels last."""
        height, width = self._pixels.shape[1:3]
        rows, columns = crops.sources(height, width)
        rows, columns = rows - crops.pad, columns - crops.pad
        inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
        chosen = self._on(indices)[:, None, None]
        rows, columns = rows.clip(0, height - 1)[:, :, None], columns.clip(0, width - 1)[:, None, :]
        found = self._pixels[chosen, self._on(rows), self._on(columns)]
        return (found * self._on(inside)[:, :, :, None]).permute(0, 3, 1, 2)

    def _on(self, values: NDArray[np.int64] | NDArray[np.bool_]) -> Tensor:
        return torch.from_numpy(values).to(self._pixels.device)


def resident_images(dataset: Dataset, device: torch.device) -> ResidentImages | None:
    """The images on the device; None where they stay with the host.

    They do where the CPU trains, where they would take more than `SHARE` of a GPU's free memory, and where the set makes its
    own crops: of photographs in folders.
    """
    if device.type == "cpu" or dataset.crop is not None:
        return None
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if len(dataset) * math.prod(dataset.image_shape) > SHARE * free:
            return None
    return ResidentImages(dataset, device)
