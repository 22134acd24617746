"""CIFAR-10 through torchvision, downloaded when it is missing.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import sys
import tarfile
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgeguard.data.dataset import Dataset, from_arrays
from edgeguard.errors import InputError, MissingDependency, require


def default_folder() -> Path:
    """The user's cache: $XDG_CACHE_HOME/edgeguard, or ~/.cache/edgeguard."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "edgeguard"


def load_cifar10(folder: Path | None, split: Literal["train", "test"]) -> Dataset:
    """50,000 training or 10,000 test images of 32x32 pixels, 10 classes.

    Args:
        folder: where torchvision keeps `cifar-10-batches-py`; the user's cache when None.

    Raises:
        InputError: the files are missing or damaged and cannot be downloaded.
        MissingDependency: torchvision is not installed.
    """
    folder = folder or default_folder()
    try:
        cifar = require("torchvision.datasets", "train").CIFAR10
    except MissingDependency as exc:
        raise MissingDependency(f"{exc}; on a device give the images as --data npz:FILE") from None
    try:
        found = _open(cifar, folder, split, download=False)
    except (OSError, RuntimeError):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            found = _open(cifar, folder, split, download=True)
        except (OSError, RuntimeError, EOFError, http.client.HTTPException, tarfile.TarError) as exc:
            raise InputError(
                f"CIFAR-10 is not in {folder} and its download failed ({exc}); "
                "give the folder that holds cifar-10-batches-py as --data cifar10:DIR"
            ) from exc
    return from_arrays(f"cifar10 {split}", found.data, np.array(found.targets, np.int64), tuple(found.classes))


def _open(cifar: Any, folder: Path, split: str, download: bool) -> Any:
    """torchvision prints progress on stdout, where only results belong, and NumPy warns about its old pickles.

    torchvision unpickles only files whose MD5 is the published one.
    """
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cifar(str(folder), train=split == "train", download=download)
