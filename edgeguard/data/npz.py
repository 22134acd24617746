"""A data set in one NumPy archive. Nothing is unpickled, and sizes are checked before anything is allocated."""

from __future__ import annotations

import math
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeguard.data.dataset import Dataset, from_arrays
from edgeguard.errors import InputError

MAX_BYTES = 4 << 30


def load_npz(path: Path, limit: int = MAX_BYTES) -> Dataset:
    """Read `images` (N, H, W, 3) uint8, `labels` (N,) int64 and, optionally, `class_names` (classes,) of text.

    Args:
        limit: the most bytes the three may take in memory.

    Raises:
        InputError: missing, truncated, larger than `limit`, pickled, or of other shapes and types.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
            for key in ("images", "labels"):
                if f"{key}.npy" not in members:
                    raise InputError(
                        f"{path} has no array {key!r}; expected images (N, H, W, 3) uint8 and labels int64"
                    )
            keys = [key for key in ("images", "labels", "class_names") if f"{key}.npy" in members]
            budget = limit
            for key in keys:
                budget -= _declared_bytes(archive, path, f"{key}.npy")
            if budget < 0:
                raise InputError(f"{path} unpacks to more than {limit} bytes; use a folder of images instead")
            arrays = {key: _read(archive, f"{key}.npy") for key in keys}
    except FileNotFoundError as exc:
        raise InputError(f"{path} does not exist") from exc
    except (
        OSError, ValueError, TypeError, KeyError, EOFError, SyntaxError, MemoryError, RuntimeError,
        zipfile.BadZipFile, zlib.error,
    ) as exc:  # fmt: skip
        raise InputError(f"{path} is not a readable NumPy archive: {exc}") from exc
    names = arrays.get("class_names")
    if names is not None and (names.dtype.kind != "U" or names.ndim != 1):
        raise InputError(f"{path}: class_names must be (classes,) text, got {names.shape} {names.dtype}")
    class_names = None if names is None else tuple(str(name) for name in names)
    return from_arrays(path.stem, arrays["images"], arrays["labels"], class_names)


def _declared_bytes(archive: zipfile.ZipFile, path: Path, member: str) -> int:
    """Bytes of an array by its own header, which must be what the archive says the member unpacks to."""
    with archive.open(member) as handle:
        version = np.lib.format.read_magic(handle)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise InputError(f"{path}: {member} is of npy version {version}; expected 1.0 or 2.0")
        shape, _, dtype = readers[version](handle)
        if dtype.hasobject:
            raise InputError(f"{path}: {member} holds Python objects; only plain arrays are read")
        size = math.prod(shape) * dtype.itemsize
        if archive.getinfo(member).file_size - handle.tell() != size:
            raise InputError(f"{path}: {member} declares {size} bytes, but the archive holds another number")
    return int(size)


def _read(archive: zipfile.ZipFile, member: str) -> NDArray[Any]:
    with archive.open(member) as handle:
        array: NDArray[Any] = np.lib.format.read_array(handle, allow_pickle=False)
    return array
