"""A folder of images, one subfolder per class, read only when asked for. Needs Pillow."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgeguard.data.dataset import Crop, Dataset, Images
from edgeguard.data.decode import DRAWS, PHOTO_SIDE, opened, read_centre, read_crop, read_whole, resized_side
from edgeguard.errors import InputError, require

Split = Literal["train", "test"]
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
SPLIT_FOLDERS: dict[Split, tuple[str, ...]] = {"train": ("train",), "test": ("test", "val")}
MAX_THREADS = 256
DEFAULT_THREADS = 16
"""At most, where the caller names no number: beyond, Python's own share of the work holds the threads up."""


@dataclass(frozen=True, eq=False)
class _Files:
    """Image files and how they are read. names: relative to `root`. image_size: None: all are of `size` already."""

    root: Path
    names: list[str]
    size: tuple[int, int]
    image_size: int | None
    threads: int

    def read(self, wanted: NDArray[np.int64]) -> Images:
        """The images to judge, (n, 3, H, W) uint8."""
        side = self.image_size
        if side is None:
            return self._all(wanted, lambda row, path: read_whole(path, self.size))
        return self._all(wanted, lambda row, path: read_centre(path, side))

    def crops(self, side: int) -> Crop:
        """A function to random parts of the images, (n, 3, side, side) uint8."""

        def crop(wanted: NDArray[np.int64], draws: NDArray[np.float64], flip: bool) -> Images:
            return self._all(wanted, lambda row, path: read_crop(path, side, draws[row], flip))

        return crop

    def _all(self, wanted: NDArray[np.int64], read: Callable[[int, Path], Images]) -> Images:
        """Pillow decodes and resizes without the interpreter's lock, so threads help; each fills rows of its own."""
        images = np.empty((len(wanted), 3, *self.size), np.uint8)

        def fill(row: int) -> None:
            images[row] = read(row, self.root / self.names[wanted[row]])

        with ThreadPoolExecutor(min(self.threads, len(wanted))) as pool:
            for _ in pool.map(fill, range(len(wanted))):
                pass
        return images


def split_folders(folder: Path) -> dict[Split, Path]:
    """The subfolders of `folder` that are splits (they hold class folders of their own); empty when it is one set."""
    found: dict[Split, Path] = {}
    for split, names in SPLIT_FOLDERS.items():
        for name in names:
            if split not in found and _subfolders(folder / name):
                found[split] = folder / name
    return found


def load_folder(folder: Path, split: Split, image_size: int | None = None, threads: int | None = None) -> Dataset:
    """Images of FOLDER/train or FOLDER/test (or val); of FOLDER itself when it has neither.

    Classes are the subfolders' names in sorted order; those of `train`, where it is there, also for the test split.
    Pixels are taken as stored: transparency is dropped, EXIF rotation is not applied, of 16 bits per colour the upper 8 are
    kept; 16-bit grey is refused. No pixel is read before it is asked for, so the set may be of any size; its digest is of
    the names, sizes and labels of the files, not of their content.

    Args:
        image_size: side of the square images to make, see `edgeguard.data.decode`: from 128 pixels on by torchvision's
            recipe, and then with random crops to train on. None: all images have one size already, which takes a look
            into every file.
        threads: that decode at once; they do not change a byte. None: one for every CPU of this process, up to 16.

    Raises:
        InputError: no such folder or split, no classes or images, mixed sizes, or an image that cannot be read.
        MissingDependency: Pillow is not installed.
    """
    require("PIL.Image", "train")
    if image_size is not None and not 1 <= image_size <= 4096:
        raise InputError(f"the image size must lie between 1 and 4096 pixels, got {image_size}")
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise InputError(
            f"the number of threads that decode images must lie between 1 and {MAX_THREADS}, got {threads}"
        )
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder" if folder.exists() else f"{folder} does not exist")
    splits = split_folders(folder)
    if splits and split not in splits:
        wanted, there = " or ".join(SPLIT_FOLDERS[split]), " and ".join(path.name for path in splits.values())
        raise InputError(f"{folder} has no folder {wanted} with class folders in it, only {there}")
    root = splits.get(split, folder)
    classes = tuple(path.name for path in _subfolders(splits.get("train", root)))
    names, sizes, labels = _find(root, classes)
    size = _common_size(root, names) if image_size is None else (image_size, image_size)
    files = _Files(root, names, size, image_size, threads or min(DEFAULT_THREADS, _cpus()))
    return Dataset(
        root.name or str(root),
        np.array(labels, np.int64),
        classes,
        (3, *size),
        _digest(classes, image_size, zip(names, sizes, labels, strict=True)),
        files.read,
        files.crops(image_size) if image_size is not None and image_size >= PHOTO_SIDE else None,
        DRAWS,
    )


def _cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _find(root: Path, classes: tuple[str, ...]) -> tuple[list[str], list[int], list[int]]:
    """Names relative to `root`, sizes in bytes and labels of the image files, by class and then by name."""
    names: list[str] = []
    sizes: list[int] = []
    labels: list[int] = []
    found = _subfolders(root)
    if not found:
        raise InputError(f"{root} has no class folders; expected {root}/CLASS/IMAGE")
    numbers = {name: number for number, name in enumerate(classes)}
    for path in found:
        if path.name not in numbers:
            raise InputError(
                f"{path} is a class that the training images do not have; they have {len(classes)} classes"
            )
        images = sorted(_images_below(root, path))
        if not images:
            raise InputError(f"{path} holds no images; looked for {' '.join(SUFFIXES)}")
        names += (name for name, _ in images)
        sizes += (size for _, size in images)
        labels += [numbers[path.name]] * len(images)
    return names, sizes, labels


def _images_below(root: Path, folder: Path) -> Iterator[tuple[str, int]]:
    """Name and size of every image file below a folder. One look at each file: a set may have millions."""

    def fail(error: OSError) -> None:
        raise InputError(f"{error.filename} cannot be listed: {error.strerror}") from error

    for where, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = Path(where).relative_to(root).as_posix()
        for name in names:
            if name.startswith(".") or not name.lower().endswith(SUFFIXES):
                continue
            path = os.path.join(where, name)
            try:
                found = os.stat(path)
            except OSError as exc:
                raise InputError(f"{path} cannot be read: {exc.strerror}") from exc
            if not stat.S_ISREG(found.st_mode):
                raise InputError(f"{path} is named like an image but is no file; remove it")
            yield f"{relative}/{name}", found.st_size


def _common_size(root: Path, names: list[str]) -> tuple[int, int]:
    """Height and width of every image, from their headers."""
    first: tuple[int, int] | None = None
    for name in names:
        path = root / name
        with opened(path) as image:
            size = (image.height, image.width)
        first = first or size
        if size != first:
            raise InputError(
                f"images differ in size: {root / names[0]} is {first[1]}x{first[0]}, {path} is {size[1]}x{size[0]}; "
                "give an image size to resize them to"
            )
    if first is None:
        raise InputError("no images")
    return first


def _digest(classes: tuple[str, ...], image_size: int | None, entries: Iterator[tuple[str, int, int]]) -> str:
    """Of names, sizes and labels, and of how images are resized."""
    resized = None if image_size is None else [image_size, resized_side(image_size)]
    digest = hashlib.sha256(json.dumps([classes, resized]).encode())
    for entry in entries:
        digest.update(json.dumps(entry).encode())
    return digest.hexdigest()
