"""One image file to pixels: checked before it is decoded, cut in the middle to judge, cut at random to train. Needs Pillow.

From `PHOTO_SIDE` on an image size means photographs, and the recipe of torchvision's classifiers holds: the shorter side
becomes 8/7 of the image size (256 for 224) and the centre is cut out; training cuts a random part instead (random resized
crops, Szegedy et al. 2015, arXiv:1409.4842, section 6). Smaller images are often wholly filled by what they show: their
shorter side becomes the image size itself.
"""

from __future__ import annotations

import math
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeguard.data.dataset import Images
from edgeguard.errors import InputError, require
from edgeguard.memory import return_freed_memory

FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"})
MAX_PIXELS = 64 << 20
"""Of an image, and of all images that a process decodes at a time."""
COPIES = {"WEBP": 2}
"""Pixels of these formats count so often: their decoder holds the image several times."""
MAX_BYTES = 256 << 20
"""Of a file, and of all files that are open at a time: some decoders read a file, or a part of any size, at once."""
STRIP = 4 << 20
"""Pixels that become an array at a time."""
MAX_SIDE = 65_535
"""What a JPEG can have. Pillow's coordinates are float32, which are exact to 1/256 of a pixel up to here."""
PHOTO_SIDE = 128
CROP_AREA = (0.25, 1.0)
"""Share of the image that a training crop keeps. From scratch 0.08 is usual; trained nets are only tuned here."""
CROP_RATIO = (3 / 4, 4 / 3)
"""Width over height of a training crop, uniform in its logarithm."""
TRIES = 10
DRAWS = 2 * TRIES + 3
"""Uniform numbers that one training crop takes: area and ratio of each try, left, top, mirror."""
Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of the image."""


def resized_side(image_size: int) -> int:
    """Pixels of the shorter side before the centre of `image_size` is cut out."""
    return round(image_size * 256 / 224) if image_size >= PHOTO_SIDE else image_size


def centre_box(size: tuple[int, int], image_size: int) -> Box:
    """The part of an image of `size` (width, height) that torchvision's Resize and CenterCrop would show."""
    shorter, side = min(size), resized_side(image_size)
    width, height = (side if length == shorter else int(side * length / shorter) for length in size)
    left, top = round((width - image_size) / 2), round((height - image_size) / 2)
    x, y = size[0] / width, size[1] / height
    return left * x, top * y, min((left + image_size) * x, size[0]), min((top + image_size) * y, size[1])


def crop_box(size: tuple[int, int], draws: NDArray[np.float64]) -> tuple[int, int, int, int]:
    """A random part of an image of `size` (width, height): of `CROP_AREA` and `CROP_RATIO` where that fits.

    draws: (DRAWS,) in [0, 1). Where no try fits, the largest centred part whose ratio is allowed.
    """
    width, height = size
    low, high = math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])
    for area_draw, ratio_draw in draws[: 2 * TRIES].reshape(TRIES, 2).tolist():
        area = width * height * (CROP_AREA[0] + area_draw * (CROP_AREA[1] - CROP_AREA[0]))
        ratio = math.exp(low + ratio_draw * (high - low))
        wide, tall = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < tall <= height:
            left, top = int(draws[-3] * (width - wide + 1)), int(draws[-2] * (height - tall + 1))
            return left, top, left + wide, top + tall
    wide = max(1, min(width, round(height * CROP_RATIO[1])))
    tall = max(1, min(height, round(width / CROP_RATIO[0])))
    left, top = (width - wide) // 2, (height - tall) // 2
    return left, top, left + wide, top + tall


class _Room:
    """So much of something that all threads together may hold; who asks for more waits until there is room."""

    def __init__(self, size: int) -> None:
        self._free, self._changed = size, threading.Condition()

    @contextmanager
    def taken(self, amount: int) -> Iterator[None]:
        """amount: at most the whole size."""
        with self._changed:
            self._changed.wait_for(lambda: self._free >= amount)
            self._free -= amount
        try:
            yield
        finally:
            with self._changed:
                self._free += amount
                self._changed.notify_all()


_OPEN, _DECODED = _Room(MAX_BYTES), _Room(MAX_PIXELS)
"""Taken in this order, so no thread waits for another that waits for it."""


@contextmanager
def _decoding(image: Any) -> Iterator[None]:
    """Waits until there is room for the pixels of an image, and frees them before others may have it."""
    pixels = int(image.width * image.height)
    with _DECODED.taken(pixels * COPIES.get(image.format, 1)):
        try:
            yield
        finally:
            image.close()
            if pixels > STRIP:
                return_freed_memory()


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A Pillow image, its type and size checked before its pixels are decoded; whatever fails names the file."""
    pillow = require("PIL.Image", "train")
    try:
        status = path.stat()
        size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path} cannot be read as an image: it is not a plain file")
        if size > MAX_BYTES:
            raise InputError(f"{path} has {size} bytes; images of at most {MAX_BYTES} are read")
        with _OPEN.taken(size), path.open("rb") as handle, pillow.open(handle, formats=FORMATS) as image:
            most = MAX_PIXELS // COPIES.get(image.format, 1)
            if image.width * image.height > most or max(image.size) > MAX_SIDE:
                raise InputError(
                    f"{path} has {image.width}x{image.height} pixels; at most {most}, and {MAX_SIDE} a side, are read"
                )
            if image.mode not in MODES:
                raise InputError(f"{path} is of mode {image.mode}; expected 8 bits per channel: convert the file")
            yield image
    except InputError:
        raise
    except Exception as exc:  # a damaged file may raise anything in its decoder
        raise InputError(f"{path} cannot be read as an image: {exc}") from exc


def read_whole(path: Path, size: tuple[int, int]) -> Images:
    """An image as it is stored: (3, height, width) uint8.

    Raises:
        InputError: it cannot be read, or is not of `size` (height, width).
    """
    with opened(path) as image, _decoding(image):
        if (image.height, image.width) != size:
            raise InputError(
                f"{path} is now {image.width}x{image.height}, but was {size[1]}x{size[0]} when the folder was opened"
            )
        return _pixels(image)


def read_centre(path: Path, image_size: int) -> Images:
    """The centre, resized with antialiasing: (3, image_size, image_size) uint8.

    An image that has this size already is taken as it is. The others equal torchvision's `Resize` and `CenterCrop` on the
    Pillow image to one grey level; only what is kept is ever resized.

    Raises:
        InputError: it cannot be read.
    """
    with opened(path) as image, _decoding(image):
        if image.size == (image_size, image_size):
            return _pixels(image)
        return _resized(image, image_size, centre_box(image.size, image_size))


def read_crop(path: Path, image_size: int, draws: NDArray[np.float64], flip: bool) -> Images:
    """A random part of the image, resized with antialiasing: (3, image_size, image_size) uint8.

    Where a JPEG has at least twice the pixels that are needed, it is decoded at 1/2, 1/4 or 1/8 of its size.

    draws: (DRAWS,) in [0, 1), which decide everything. flip: mirror half of the images.

    Raises:
        InputError: it cannot be read.
    """
    with opened(path) as image:
        width, height = image.size
        left, top, right, bottom = crop_box(image.size, draws)
        scale = 1
        spare = min(right - left, bottom - top) // image_size
        if spare > 1:
            drafted = image.draft(None, (width // spare, height // spare))
            scale = 1 if drafted is None else round(width / drafted[1][2])
        with _decoding(image):
            box = (left / scale, top / scale, min(right / scale, image.width), min(bottom / scale, image.height))
            pixels = _resized(image, image_size, box)
    return pixels[:, :, ::-1] if flip and draws[-1] < 0.5 else pixels


def _resized(image: Any, image_size: int, box: Box) -> Images:
    """A part of an image, resized with antialiasing."""
    bilinear = require("PIL.Image", "train").Resampling.BILINEAR
    return _pixels(_rgb(image).resize((image_size, image_size), bilinear, box=box))


def _rgb(image: Any) -> Any:
    """Red, green and blue as stored: transparency is dropped, EXIF rotation is not applied, as torchvision does it."""
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _pixels(image: Any) -> Images:
    """(3, height, width) uint8; of a large image strip by strip, so that no second copy of it is made."""
    width, height = image.size
    rows = max(1, STRIP // width)
    if height <= rows:
        pixels: Images = np.asarray(_rgb(image), np.uint8).transpose(2, 0, 1)
        return pixels
    pixels = np.empty((3, height, width), np.uint8)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        pixels[:, top : top + rows] = np.asarray(_rgb(strip), np.uint8).transpose(2, 0, 1)
    return pixels
