"""Training-time augmentation on uint8 pixels, a function of the generator it is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

PAD_SHARE = 8


@dataclass(frozen=True, eq=False)
class Crops:
    """Where the training crop of each image lies in the image padded by `pad`, and which crops are mirrored.

    rows, columns: (n,) int64, 0 to 2 * pad. mirrored: (n,) bool.
    """

    pad: int
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    mirrored: NDArray[np.bool_]

    @staticmethod
    def draw(count: int, side: tuple[int, int], rng: np.random.Generator, flip: bool) -> Crops:
        """Uniform offsets for images of `side` (H, W), padded by an eighth of it; half are mirrored, if `flip`."""
        pad = max(1, min(side) // PAD_SHARE)
        rows, columns = rng.integers(0, 2 * pad + 1, count), rng.integers(0, 2 * pad + 1, count)
        mirrored: NDArray[np.bool_] = np.less(rng.random(count), 0.5) if flip else np.zeros(count, bool)
        return Crops(pad, rows, columns, mirrored)

    @staticmethod
    def whole(count: int) -> Crops:
        """Images as they are."""
        return Crops(0, np.zeros(count, np.int64), np.zeros(count, np.int64), np.zeros(count, bool))

    def cut(self, chosen: slice | NDArray[Any]) -> Crops:
        """Those of some of the images."""
        return Crops(self.pad, self.rows[chosen], self.columns[chosen], self.mirrored[chosen])

    def apply(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """images: (n, 3, H, W) uint8; the result has that shape and type."""
        count, _, height, width = images.shape
        pad = self.pad
        padded = np.pad(images, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
        rows, columns = self.sources(height, width)
        out: NDArray[np.uint8] = padded[np.arange(count)[:, None, None, None], np.arange(3)[None, :, None, None],
                                        rows[:, None, :, None], columns[:, None, None, :]]  # fmt: skip
        return out

    def sources(self, height: int, width: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which row (n, H) and column (n, W) of the padded image each one of the crop is."""
        rows = self.rows[:, None] + np.arange(height)
        columns = self.columns[:, None] + np.arange(width)
        return rows, np.where(self.mirrored[:, None], columns[:, ::-1], columns)


def crop_and_flip(images: NDArray[np.uint8], rng: np.random.Generator, flip: bool) -> NDArray[np.uint8]:
    """Random crops of images zero-padded by an eighth of their side, then, if `flip`, a random horizontal mirror.

    images: (N, 3, H, W) uint8; the result has that shape and type.
    """
    return Crops.draw(len(images), (images.shape[2], images.shape[3]), rng, flip).apply(images)
