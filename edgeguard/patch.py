"""The patch, and the one function that puts it on images: training, attacks, simulation and engines all use it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgeguard import files
from edgeguard.errors import InputError

Positions = NDArray[np.int64]
"""(N, 2) row and column of each image's top left patch pixel."""

Array = TypeVar("Array", bound=Any)


@dataclass(frozen=True, eq=False)
class Patch:
    """pixels: (3, h, w) uint8 RGB. mask: (h, w) bool, True where the patch covers the image."""

    pixels: NDArray[np.uint8]
    mask: NDArray[np.bool_]

    def __post_init__(self) -> None:
        if self.pixels.dtype != np.uint8 or self.pixels.ndim != 3 or self.pixels.shape[0] != 3:
            raise InputError(f"patch pixels must be (3, h, w) uint8, got {self.pixels.shape} {self.pixels.dtype}")
        if self.mask.dtype != np.bool_ or self.mask.shape != self.pixels.shape[1:] or not self.mask.any():
            raise InputError(f"a {self.pixels.shape[1:]} patch needs a boolean mask of that shape, not all False")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.pixels.shape[1], self.pixels.shape[2]

    @property
    def sha256(self) -> str:
        """Of the pixels and the mask; see `digest`."""
        return digest(self.pixels, self.mask)

    def save(self, path: Path) -> None:
        """Write an npz file; equal patches give equal bytes."""
        files.write_npz(path, {"pixels": self.pixels, "mask": self.mask})

    @staticmethod
    def load(path: Path, limit: int = 64 << 20) -> Patch:
        """Read an npz file with `pixels` and, optionally, `mask`.

        Raises:
            InputError: missing, truncated, larger than `limit` bytes unpacked, or not a patch.
        """
        arrays = files.read_npz(path, limit)
        pixels = arrays.get("pixels")
        if pixels is None:
            raise InputError(f"{path} is not a patch file: it has no array 'pixels'")
        try:
            mask = arrays.get("mask")  # a missing one is only made for pixels that are there: a shape may be of any size
            return Patch(pixels, np.ones(pixels.shape[1:] if pixels.size else 0, bool) if mask is None else mask)
        except InputError as exc:
            raise InputError(f"{path}: {exc}") from exc


def digest(pixels: NDArray[np.uint8], mask: NDArray[np.bool_]) -> str:
    """Hexadecimal SHA-256 of the shape, mask and pixels of one patch or several; no file's, as files vary."""
    parts = (repr(mask.shape).encode(), mask.tobytes(), pixels.tobytes())
    return hashlib.sha256(b"".join(parts)).hexdigest()


def square(pixels: NDArray[np.uint8]) -> Patch:
    """A patch without holes."""
    return Patch(pixels, np.ones(pixels.shape[1:], bool))


def check_fits(size: tuple[int, int], image: tuple[int, int]) -> None:
    """Raises InputError when a patch of `size` (h, w) is larger than an image of (H, W)."""
    if size[0] > image[0] or size[1] > image[1]:
        raise InputError(f"a patch of {size[0]}x{size[1]} pixels is larger than the image, {image[0]}x{image[1]}")


def apply_patch(images: Array, pixels: Array, mask: NDArray[np.bool_], positions: Positions) -> Array:
    """Copy of `images` with a patch pasted on each.

    Works on NumPy arrays and on torch tensors alike, and lets gradients flow to `images` and `pixels`.

    Args:
        images: (N, 3, H, W), any dtype.
        pixels: (3, h, w) for one patch on all images or (N, 3, h, w) for one each; the dtype of `images`.
        mask: (h, w) bool.
        positions: (N, 2) row and column of the top left corner; the patch must lie inside the image.

    Raises:
        InputError: when a patch is larger than the image or would reach over its border.
    """
    height, width = mask.shape
    check_fits((height, width), (images.shape[2], images.shape[3]))
    limit = np.array([images.shape[2] - height, images.shape[3] - width])
    if positions.shape != (images.shape[0], 2) or (positions < 0).any() or (positions > limit).any():
        raise InputError(f"positions must be ({images.shape[0]}, 2), between 0 and {limit.tolist()}")
    patched: Array = images.copy() if isinstance(images, np.ndarray) else images.clone()
    image, row, column = window_index(mask, positions)
    inside_row, inside_column = np.nonzero(mask)
    if pixels.ndim == 3:
        values = pixels[:, inside_row, inside_column].T  # (masked, 3), broadcast over the images
    else:
        values = pixels[:, :, inside_row, inside_column]  # (N, 3, masked)
        values = values.transpose(0, 2, 1) if isinstance(values, np.ndarray) else values.transpose(1, 2)
    patched[image, :, row, column] = values
    return patched


def window_index(mask: NDArray[np.bool_], positions: Positions) -> tuple[Any, Any, Any]:
    """Indices (N, masked) of image, row and column of every pixel that the patch covers."""
    inside_row, inside_column = np.nonzero(mask)
    image = np.arange(len(positions))[:, None]
    return image, positions[:, :1] + inside_row, positions[:, 1:] + inside_column


def random_positions(
    count: int, image: tuple[int, int], patch: tuple[int, int], rng: np.random.Generator
) -> Positions:
    """Uniform placements, (count, 2), of a patch (h, w) inside an image (H, W)."""
    check_fits(patch, image)
    rows = rng.integers(0, image[0] - patch[0] + 1, count)
    columns = rng.integers(0, image[1] - patch[1] + 1, count)
    return np.stack([rows, columns], 1)


def grid_positions(image: tuple[int, int], patch: tuple[int, int], stride: int) -> Positions:
    """Every placement on a stride, (P, 2); the last row and column are always among them.

    Raises:
        InputError: when the stride is below 1 or the patch does not fit.
    """
    check_fits(patch, image)
    if stride < 1:
        raise InputError(f"the placement stride must be at least 1, got {stride}")
    axes = [sorted({*range(0, big - small + 1, stride), big - small}) for big, small in zip(image, patch, strict=True)]
    return np.array([(row, column) for row in axes[0] for column in axes[1]], np.int64)
