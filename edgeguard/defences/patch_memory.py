"""The patch that each training image had last, so that attacks go on from one epoch to the next. NumPy only.

A few steps an epoch add up to a strong attack when they start from what the last epoch left (Zheng et al. 2020, "Efficient
Adversarial Training with Transferable Adversarial Examples", arXiv:1912.11969). As there, what is kept lies in the
coordinates of the image itself: crops and mirrors are undone when a patch is kept and redone when it is recalled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeguard.defences.augment import Crops
from edgeguard.errors import InputError
from edgeguard.patch import Positions

LIMIT_BYTES = 1 << 30
UNKNOWN = -(1 << 14)


class PatchMemory:
    """For each of `count` images a patch of `side` x `side` pixels and its place; smaller patches are its middle."""

    def __init__(self, count: int, side: int) -> None:
        """Raises InputError when it would take more than `LIMIT_BYTES`."""
        if count * 3 * side * side > LIMIT_BYTES:
            raise InputError(
                f"keeping patches of {side}x{side} for {count} images takes {count * 3 * side * side >> 20} MB; "
                "train with --keep 0, or against smaller patches"
            )
        self._pixels = np.zeros((count, 3, side, side), np.uint8)
        self._places = np.full((count, 2), UNKNOWN, np.int16)

    def known(self, indices: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of the images have a patch."""
        found: NDArray[np.bool_] = self._places[indices, 0] != UNKNOWN
        return found

    def recall(
        self, indices: NDArray[np.int64], crops: Crops, side: int, image: tuple[int, int]
    ) -> tuple[NDArray[np.uint8], Positions]:
        """Patches (n, 3, side, side) and their places (n, 2) in this epoch's crops of images of (H, W).

        A place outside the crop is moved to its border. The images must be known.
        """
        edge = self._edge(side)
        pixels = self._pixels[indices][:, :, edge : edge + side, edge : edge + side]
        pixels = np.where(crops.mirrored[:, None, None, None], pixels[..., ::-1], pixels)
        rows = self._places[indices, 0].astype(np.int64) + edge + crops.pad - crops.rows
        columns = self._places[indices, 1].astype(np.int64) + edge + crops.pad - crops.columns
        columns = np.where(crops.mirrored, image[1] - side - columns, columns)
        limit = [image[0] - side, image[1] - side]
        return pixels, np.stack([rows, columns], 1).clip(0, limit)

    def keep(
        self, indices: NDArray[np.int64], crops: Crops, pixels: NDArray[np.uint8], places: Positions, width: int,
        rng: np.random.Generator,
    ) -> None:  # fmt: skip
        """Remember patches (n, 3, side, side) at places (n, 2) of crops that are `width` wide.

        The ring around a smaller patch stays as it was; an image's first patch is surrounded by random pixels.
        """
        side = pixels.shape[2]
        edge = self._edge(side)
        new = indices[~self.known(indices)]
        self._pixels[new] = rng.integers(0, 256, (len(new), *self._pixels.shape[1:]), np.uint8)
        pixels = np.where(crops.mirrored[:, None, None, None], pixels[..., ::-1], pixels)
        self._pixels[indices, :, edge : edge + side, edge : edge + side] = pixels
        columns = np.where(crops.mirrored, width - side - places[:, 1], places[:, 1])
        rows = places[:, 0] - crops.pad + crops.rows - edge
        self._places[indices] = np.stack([rows, columns - crops.pad + crops.columns - edge], 1)

    def _edge(self, side: int) -> int:
        return (self._pixels.shape[2] - side) // 2

    def state(self) -> dict[str, Any]:
        """`memory.pixels` (N, 3, s, s) uint8 and `memory.places` (N, 2) int16."""
        return {"memory.pixels": self._pixels.copy(), "memory.places": self._places.copy()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Raises InputError when the arrays are missing or of another shape or type."""
        for name, own in self.state().items():
            given = state.get(name)
            if not isinstance(given, np.ndarray) or given.shape != own.shape or given.dtype != own.dtype:
                raise InputError(f"the memory of patches needs {name} of {own.shape} {own.dtype}")
        self._pixels, self._places = state["memory.pixels"].copy(), state["memory.places"].copy()
