"""The embedded digits, so that everything can be tried without a download.

Source: "Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, 1998, UCI Machine Learning Repository,
doi:10.24432/C50P49, CC BY 4.0, as distributed with scikit-learn: 1,797 images of 8x8 pixels, 17 grey levels.
`benchmarks/make_digits.py` wrote the file.
"""

from __future__ import annotations

import io
import pkgutil
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgeguard.data.dataset import Dataset, Images, from_arrays
from edgeguard.errors import InputError

SIZE = 32
MAX_SIZE = 256
LEVELS = 16
TEST_EVERY = 5


def bilinear(images: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Resize (N, h, w) to (N, size, size) between pixel centres, the border repeated; the same on every machine."""
    for axis in (1, 2):
        old = images.shape[axis]
        position = np.clip((np.arange(size) + 0.5) * (old / size) - 0.5, 0, old - 1)
        low = np.floor(position).astype(np.int64)
        high = np.minimum(low + 1, old - 1)
        weight = (position - low).reshape((-1, 1) if axis == 1 else (1, -1))
        images = images.take(low, axis) * (1 - weight) + images.take(high, axis) * weight
    return images


def load_digits(split: Literal["train", "test"], image_size: int | None = None) -> Dataset:
    """Digits as RGB: resized without a library (32x32 unless `image_size` says otherwise), scaled from 0..16 to 0..255.

    The split is fixed and stratified: with the images sorted by class, every fifth one is for testing (1,437 and 360).

    Raises:
        InputError: when `image_size` is not between 8 and 256.
    """
    size = SIZE if image_size is None else image_size
    if not 8 <= size <= MAX_SIZE:
        raise InputError(f"digits can be resized to 8 to {MAX_SIZE} pixels, not to {size}")
    packed = pkgutil.get_data("edgeguard.data", "digits.npz")
    if packed is None:
        raise InputError("digits.npz is missing from the installed package; install edgeguard again")
    with np.load(io.BytesIO(packed), allow_pickle=False) as data:
        raw, labels = data["images"], data["labels"].astype(np.int64)
    order = np.argsort(labels, kind="stable")
    is_test = np.zeros(len(labels), bool)
    is_test[order[::TEST_EVERY]] = True
    chosen = is_test if split == "test" else ~is_test
    grey = np.rint(bilinear(raw[chosen].astype(np.float64), size) * 255 / LEVELS).astype(np.uint8)
    images: Images = np.repeat(grey[..., None], 3, axis=3)
    return from_arrays(f"digits {split}", images, labels[chosen], tuple("0123456789"))
