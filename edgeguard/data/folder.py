"""A folder of images, one subfolder per class, read only when asked for. Needs Pillow."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgeguard.data.dataset import Dataset, Images
from edgeguard.errors import InputError, require

Split = Literal["train", "test"]
SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"})
MAX_PIXELS = 64 << 20
SPLIT_FOLDERS: dict[Split, tuple[str, ...]] = {"train": ("train",), "test": ("test", "val")}


def split_folders(folder: Path) -> dict[Split, Path]:
    """The subfolders of `folder` that are splits (they hold class folders of their own); empty when it is one set."""
    found: dict[Split, Path] = {}
    for split, names in SPLIT_FOLDERS.items():
        for name in names:
            if split not in found and _subfolders(folder / name):
                found[split] = folder / name
    return found


def load_folder(folder: Path, split: Split, image_size: int | None = None) -> Dataset:
    """Images of FOLDER/train or FOLDER/test (or val); of FOLDER itself when it has neither.

    Classes are the subfolders' names in sorted order; those of `train`, where it is there, also for the test split.
    Pixels are taken as stored: transparency is dropped and EXIF rotation is not applied.

    Args:
        image_size: the shorter side is resized to this and the centre cut out; None: all images have one size already.

    Raises:
        InputError: no such folder or split, no classes or images, mixed sizes, or an image that cannot be read.
        MissingDependency: Pillow is not installed.
    """
    require("PIL.Image", "train")
    if image_size is not None and not 1 <= image_size <= 4096:
        raise InputError(f"the image size must lie between 1 and 4096 pixels, got {image_size}")
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder" if folder.exists() else f"{folder} does not exist")
    splits = split_folders(folder)
    if splits and split not in splits:
        wanted, there = " or ".join(SPLIT_FOLDERS[split]), " and ".join(path.name for path in splits.values())
        raise InputError(f"{folder} has no folder {wanted} with class folders in it, only {there}")
    root = splits.get(split, folder)
    classes = tuple(path.name for path in _subfolders(splits.get("train", root)))
    files, labels = _find(root, classes)
    size = _common_size(files) if image_size is None else (image_size, image_size)
    entries = [
        (f.relative_to(root).as_posix(), f.stat().st_size, label) for f, label in zip(files, labels, strict=True)
    ]
    digest = hashlib.sha256(json.dumps([classes, image_size, entries]).encode()).hexdigest()
    return Dataset(
        root.name or str(root),
        np.array(labels, np.int64),
        classes,
        (3, *size),
        digest,
        lambda wanted: _read_all(files, wanted, size, image_size),
    )


def _subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _find(root: Path, classes: tuple[str, ...]) -> tuple[list[Path], list[int]]:
    """Image files and their labels, by class and then by path."""
    files: list[Path] = []
    labels: list[int] = []
    found = _subfolders(root)
    if not found:
        raise InputError(f"{root} has no class folders; expected {root}/CLASS/IMAGE")
    for path in found:
        if path.name not in classes:
            raise InputError(
                f"{path} is a class that the training images do not have; they have {len(classes)} classes"
            )
        images = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file() and p.name[0] != ".")
        if not images:
            raise InputError(f"{path} holds no images; looked for {' '.join(sorted(SUFFIXES))}")
        files += images
        labels += [classes.index(path.name)] * len(images)
    return files, labels


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A Pillow image, its type and size checked before its pixels are decoded; whatever fails names the file."""
    pillow = require("PIL.Image", "train")
    try:
        with path.open("rb") as handle, pillow.open(handle, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise InputError(f"{path} has {image.width}x{image.height} pixels; at most {MAX_PIXELS} are read")
            if image.mode not in MODES:
                raise InputError(f"{path} is of mode {image.mode}; expected 8 bits per channel")
            yield image
    except InputError:
        raise
    except Exception as exc:  # a damaged file may raise anything in its decoder
        raise InputError(f"{path} cannot be read as an image: {exc}") from exc


def _common_size(files: list[Path]) -> tuple[int, int]:
    """Height and width of every image, from their headers."""
    first: tuple[int, int] | None = None
    for path in files:
        with _opened(path) as image:
            size = (image.height, image.width)
        first = first or size
        if size != first:
            raise InputError(
                f"images differ in size: {files[0]} is {first[1]}x{first[0]}, {path} is {size[1]}x{size[0]}; "
                "give an image size to resize them to"
            )
    if first is None:
        raise InputError("no images")
    return first


def _read_one(path: Path, size: tuple[int, int], image_size: int | None) -> Images:
    """One image, (3, H, W) uint8."""
    with _opened(path) as image:
        rgb = (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")
    if image_size is not None:
        shorter = min(rgb.size)
        width, height = (max(image_size, round(side * image_size / shorter)) for side in rgb.size)
        if (width, height) != rgb.size:
            rgb = rgb.resize((width, height), require("PIL.Image", "train").Resampling.BILINEAR)
        left, top = (width - image_size) // 2, (height - image_size) // 2
        rgb = rgb.crop((left, top, left + image_size, top + image_size))
    if (rgb.height, rgb.width) != size:
        raise InputError(
            f"{path} is now {rgb.width}x{rgb.height}, but was {size[1]}x{size[0]} when the folder was opened"
        )
    pixels: Images = np.asarray(rgb, np.uint8).transpose(2, 0, 1)
    return pixels


def _read_all(files: list[Path], wanted: NDArray[np.int64], size: tuple[int, int], image_size: int | None) -> Images:
    """(n, 3, H, W) uint8. Pillow decodes without the interpreter's lock, so threads help."""
    images = np.empty((len(wanted), 3, *size), np.uint8)
    workers = min(8, os.cpu_count() or 1, len(wanted))
    with ThreadPoolExecutor(workers) as pool:
        read = pool.map(lambda index: _read_one(files[index], size, image_size), wanted.tolist())
        for row, pixels in enumerate(read):
            images[row] = pixels
    return images
