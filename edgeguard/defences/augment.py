"""Training-time augmentation on uint8 pixels, a function of the generator it is given."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PAD_SHARE = 8


def crop_and_flip(images: NDArray[np.uint8], rng: np.random.Generator, flip: bool) -> NDArray[np.uint8]:
    """Random crops of images zero-padded by an eighth of their side, then, if `flip`, a random horizontal mirror.

    images: (N, 3, H, W) uint8; the result has that shape and type.
    """
    count, _, height, width = images.shape
    pad = max(1, min(height, width) // PAD_SHARE)
    padded = np.pad(images, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    rows = rng.integers(0, 2 * pad + 1, count)[:, None] + np.arange(height)
    columns = rng.integers(0, 2 * pad + 1, count)[:, None] + np.arange(width)
    if flip:
        mirrored: NDArray[np.bool_] = np.less(rng.random(count), 0.5)
        columns = np.where(mirrored[:, None], columns[:, ::-1], columns)
    out: NDArray[np.uint8] = padded[np.arange(count)[:, None, None, None], np.arange(3)[None, :, None, None],
                                    rows[:, None, :, None], columns[:, None, None, :]]  # fmt: skip
    return out
