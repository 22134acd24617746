"""What gradient attacks check before they start. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeguard.errors import InputError
from edgeguard.patch import Positions, check_fits


def check_material(models: Mapping[str, Any], images: NDArray[np.uint8], labels: NDArray[np.int64], size: int) -> None:
    """Models, images (N, 3, H, W) uint8, labels (N,) and a square patch of `size` pixels that fit each other.

    Raises:
        InputError: they do not.
    """
    if not models or not len(images) or labels.shape != (len(images),):
        raise InputError(
            f"crafting needs models and labelled images, got {len(models)} models, {len(images)} images "
            f"and labels of shape {labels.shape}"
        )
    check_fits((size, size), (images.shape[2], images.shape[3]))


def check_labels(labels: NDArray[np.int64], classes: int) -> None:
    """Raises InputError for labels outside 0..classes - 1."""
    if labels.min() < 0 or labels.max() >= classes:
        raise InputError(f"labels run from {labels.min()} to {labels.max()}, but the model has {classes} classes")


def need_positions(positions: Positions | None, images: NDArray[np.uint8], size: int, name: str) -> Positions:
    """The places (N, 2) of square patches of `size` pixels, for an attack that does not choose them itself.

    Raises:
        InputError: there are none, or a patch would not lie inside its image.
    """
    if positions is None:
        raise InputError(f"{name} puts its patches where it is told; give it one position for each image")
    limit = np.array(images.shape[2:]) - size
    if positions.shape != (len(images), 2) or (positions < 0).any() or (positions > limit).any():
        raise InputError(f"positions must be ({len(images)}, 2), between 0 and {limit.tolist()}")
    return positions
