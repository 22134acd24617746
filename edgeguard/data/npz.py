"""A data set in one NumPy archive."""

from __future__ import annotations

from pathlib import Path

from edgeguard import files
from edgeguard.artifact import MAX_CLASSES
from edgeguard.data.dataset import Dataset, from_arrays
from edgeguard.errors import InputError

MAX_BYTES = 4 << 30


def load_npz(path: Path, limit: int = MAX_BYTES) -> Dataset:
    """Read `images` (N, H, W, 3) uint8, `labels` (N,) int64 and, optionally, `class_names` (classes,) of text.

    Other arrays of the file are left alone.

    Args:
        limit: the most bytes the three may take in memory.

    Raises:
        InputError: missing, truncated, larger than `limit`, pickled, or of other shapes and types.
    """
    arrays = files.read_npz(path, limit, ("images", "labels", "class_names"))
    for key in ("images", "labels"):
        if key not in arrays:
            raise InputError(f"{path} has no array {key!r}; expected images (N, H, W, 3) uint8 and labels int64")
    names = arrays.get("class_names")
    if names is not None and (names.dtype.kind != "U" or names.ndim != 1):
        raise InputError(f"{path}: class_names must be (classes,) text, got {names.shape} {names.dtype}")
    if names is not None and len(names) > MAX_CLASSES:
        raise InputError(f"{path}: there can be {MAX_CLASSES} classes at most, got {len(names)} class_names")
    class_names = None if names is None else tuple(str(name) for name in names)
    return from_arrays(path.stem, arrays["images"], arrays["labels"], class_names)
