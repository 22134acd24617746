"""Patches as files of others: PNG in, where alpha is the mask, PNG out, and a PDF to print at real size.

The PNG reader trusts nothing: sizes are checked before anything is decoded, and every chunk against its CRC.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeguard import files
from edgeguard.errors import InputError, require
from edgeguard.patch import Patch, square
from edgeguard.report import png

MAX_SIDE = 4096
"""Pixels."""
MAX_BYTES = 64 << 20
COVERS = 128
"""The least alpha of a pixel that covers the image."""
ZIP = b"PK"
GREY = 0
CHANNELS = {GREY: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""By the colour type of a PNG."""
ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
"""First row and column, and the steps of both, of an interlaced PNG's passes. Source: W3C PNG, third edition, 8.1."""

Page = tuple[float, float]
"""Width and height in millimetres."""
PAPERS: dict[str, Page] = {"a4": (210.0, 297.0), "letter": (215.9, 279.4)}
INCH, POINTS = 25.4, 72.0
MARGIN, RULER = 10.0, 100.0
SIDE_SPACE, TOP_SPACE, BOTTOM_SPACE = 32.0, 40.0, 32.0
"""Millimetres: around the page and of both rulers; kept free of the patch beside, above and below it."""
CROP_GAP, CROP_LENGTH = 1.5, 5.0
"""Millimetres between the patch's corner and a crop mark, and the mark's length."""
PRINT_DPI = 300
FONT = {"family": "Helvetica", "weight": "medium"}


def load_patch(path: Path) -> Patch:
    """Read a patch from an npz file, as `Patch.load`, or from a PNG; the content decides, not the name.

    A PNG has 8 bits per channel or fewer: RGB, RGBA, grey with or without alpha, or a palette. Pixels whose alpha is at
    least 128 cover the image; without alpha all do. Colours are taken as stored: gamma and colour profiles are ignored.

    Raises:
        InputError: missing, too large, truncated, damaged, of 16 bits, animated, transparent all over, or no patch file.
        MissingDependency: Pillow is not installed.
    """
    try:
        if not path.is_file():
            raise InputError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
        size = path.stat().st_size
        with path.open("rb") as handle:
            head = handle.read(len(png.SIGNATURE))
            if head[: len(ZIP)] == ZIP:
                return Patch.load(path)
            if head != png.SIGNATURE:
                raise InputError(f"{path} is no patch file: expected an npz file or a PNG")
            if size > MAX_BYTES:
                raise InputError(f"{path} has {size} bytes; a PNG of at most {MAX_BYTES} was expected")
            data = head + handle.read(MAX_BYTES)
    except OSError as exc:
        raise InputError(f"cannot read {path}: {exc.strerror or exc}") from exc
    try:
        return _from_png(data)
    except InputError as exc:
        raise InputError(f"{path}: {exc}") from exc


def save_png(patch: Patch, path: Path, enlarge: int = 1) -> None:
    """Write a PNG that `load_patch` reads back as the same patch, pixels under holes included; equal patches, equal bytes.

    Args:
        enlarge: draw each pixel as a square of that many, for looking at; read back, that is a larger patch.

    Raises:
        InputError: an enlargement below 1 or beyond `MAX_SIDE` pixels, or the file cannot be written.
    """
    if enlarge < 1 or enlarge * max(patch.size) > MAX_SIDE:
        most = MAX_SIDE // max(patch.size)
        raise InputError(f"a patch of {_shape(patch)} pixels can be enlarged 1 to {most} times, got {enlarge}")
    pixels = patch.pixels.repeat(enlarge, 1).repeat(enlarge, 2)
    mask = patch.mask.repeat(enlarge, 0).repeat(enlarge, 1)
    files.write_bytes(path, png.encode(pixels, None if mask.all() else mask))


def save_pdf(patch: Patch, path: Path, side_mm: float, paper: str = "a4") -> None:
    """Write one page with the patch at real size, crop marks, rulers of 100 mm both ways, its size and its SHA-256.

    Each pixel is a sharp square, holes stay blank. Equal arguments give equal bytes (with the same matplotlib).

    Args:
        side_mm: the longer side in millimetres.
        paper: a key of `PAPERS`.

    Raises:
        InputError: another paper, a size that is none or does not fit the page, or the file cannot be written.
        MissingDependency: matplotlib is not installed.
    """
    if paper not in PAPERS:
        raise InputError(f"unknown paper {paper!r}; expected {' or '.join(PAPERS)}")
    page = PAPERS[paper]
    room = page[0] - 2 * SIDE_SPACE, page[1] - TOP_SPACE - BOTTOM_SPACE
    longer = max(patch.size)
    most = longer * min(room[0] / patch.size[1], room[1] / patch.size[0])
    if not 1 <= side_mm <= most:
        most = math.floor(most * 10) / 10
        raise InputError(f"a patch of {_shape(patch)} pixels fits {paper} with a longer side of 1 to {most} mm, got {side_mm}")
    height, width = (side * side_mm / longer for side in patch.size)
    left = (page[0] - width) / 2
    bottom = BOTTOM_SPACE + (room[1] - height) / 2
    text = [
        "Print at 100 % (actual size, no scaling), then check both rulers: 100 mm each.",
        f"Patch: {width:.2f} x {height:.2f} mm (width x height), {patch.size[1]} x {patch.size[0]} pixels"
        + ("" if patch.mask.all() else "; cut out what is blank"),
        f"SHA-256 {patch.sha256}",
    ]
    files.write_bytes(path, _page(patch, page, (left, bottom, width, height), text))


def _page(patch: Patch, page: Page, box: tuple[float, float, float, float], text: list[str]) -> bytes:
    """The PDF. box: left, bottom, width and height of the patch in millimetres from the page's lower left corner."""
    require("matplotlib", "report")
    figures, style = require("matplotlib.figure", "report"), require("matplotlib.style", "report")
    backend = require("matplotlib.backends.backend_pdf", "report")
    left, bottom, width, height = box
    buffer = io.BytesIO()
    # Nobody's own settings decide what is on the page; PDF's 14 standard fonts are not embedded.
    with style.context(["default", {"pdf.use14corefonts": True}]):
        figure = figures.Figure(figsize=(page[0] / INCH, page[1] / INCH), dpi=POINTS)
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, page[0]), ylim=(0, page[1]))
        axes.axis("off")
        extent = (left, left + width, bottom, bottom + height)
        axes.imshow(_dots(patch, max(width, height)), extent=extent, interpolation="none", aspect="auto", origin="upper")
        axes.set(xlim=(0, page[0]), ylim=(0, page[1]))  # an image moves the limits to its own
        _lines(axes, _crop_marks(box), 0.25)
        _rulers(axes)
        for number, line in enumerate(text):
            axes.text(MARGIN, page[1] - MARGIN - 5.0 * number, line, fontsize=9, va="top", **FONT)
        metadata = {"Creator": "EdgeGuard", "Producer": None, "CreationDate": None, "Title": "Patch"}
        backend.FigureCanvasPdf(figure).print_pdf(buffer, metadata=metadata)
    return buffer.getvalue()


def _dots(patch: Patch, side_mm: float) -> NDArray[np.uint8]:
    """(H, W, 3 or 4) uint8. Each pixel is many dots, so that a viewer that smooths images blurs less than is seen."""
    times = max(1, math.ceil(side_mm / INCH * PRINT_DPI / max(patch.size)))
    pixels = np.where(patch.mask, patch.pixels, np.uint8(255)).transpose(1, 2, 0)
    if not patch.mask.all():
        pixels = np.dstack([pixels, patch.mask.astype(np.uint8) * np.uint8(255)])
    dots: NDArray[np.uint8] = pixels.repeat(times, 0).repeat(times, 1)
    return dots


Line = tuple[tuple[float, float], tuple[float, float]]


def _crop_marks(box: tuple[float, float, float, float]) -> list[Line]:
    """Two lines at each corner, outside of the patch, that its edges prolong."""
    left, bottom, width, height = box
    near, far = CROP_GAP, CROP_GAP + CROP_LENGTH
    found: list[Line] = []
    for x, outward in ((left, -1), (left + width, 1)):
        for y, upward in ((bottom, -1), (bottom + height, 1)):
            found.append(((x + outward * near, y), (x + outward * far, y)))
            found.append(((x, y + upward * near), (x, y + upward * far)))
    return found


def _rulers(axes: Any) -> None:
    """Millimetres along the lower and the left edge, the longer marks every 5 and 10."""
    start = MARGIN + 5.0
    lines: list[Line] = [((start, start), (start + RULER, start)), ((start, start), (start, start + RULER))]
    for mark in range(round(RULER) + 1):
        length = 4.0 if mark % 10 == 0 else 3.0 if mark % 5 == 0 else 1.5
        place = start + mark
        lines += [((place, start), (place, start - length)), ((start, place), (start - length, place))]
        if mark % 20 == 0 and mark:
            axes.text(place, start + 1.0, str(mark), fontsize=7, ha="center", va="bottom", **FONT)
            axes.text(start + 1.0, place, str(mark), fontsize=7, ha="left", va="center", **FONT)
    axes.text(start + 2.0, start + 1.0, "mm", fontsize=7, ha="left", va="bottom", **FONT)
    _lines(axes, lines, 0.35)


def _lines(axes: Any, lines: list[Line], points: float) -> None:
    for start, end in lines:
        axes.plot((start[0], end[0]), (start[1], end[1]), color="black", linewidth=points, solid_capstyle="butt",
                  scalex=False, scaley=False)  # fmt: skip


def _shape(patch: Patch) -> str:
    return f"{patch.size[0]}x{patch.size[1]}"


def _from_png(data: bytes) -> Patch:
    colour, depth = _check(data)
    pillow = require("PIL.Image", "report")
    try:
        with pillow.open(io.BytesIO(data), formats=("PNG",)) as image:
            image.load()
            transparent = image.mode in ("LA", "RGBA", "PA") or "transparency" in image.info
            if colour == GREY and depth < 8 and transparent:  # Pillow compares the sample with the scaled grey
                raise InputError("grey of fewer than 8 bits with a transparent level; save it as RGBA")
            rgba = np.asarray(image.convert("RGBA"))
    except InputError:
        raise
    except Exception as exc:  # a damaged file may raise anything in its decoder
        raise InputError(f"cannot be read as a PNG: {' '.join(str(exc).split())}") from exc
    pixels = np.ascontiguousarray(rgba[..., :3].transpose(2, 0, 1))
    if not transparent:
        return square(pixels)
    mask = np.ascontiguousarray(rgba[..., 3] >= COVERS)
    if not mask.any():
        raise InputError(f"every pixel is transparent, so it covers nothing; expected an alpha of {COVERS} or more somewhere")
    return Patch(pixels, mask)


def _check(data: bytes) -> tuple[int, int]:
    """Colour type and bits per channel of a PNG that may be decoded.

    Raises:
        InputError: chunks that end too early or fail their CRC, a size beyond the limits, 16 bits, an animation, or
            another number of pixels than declared, which decoders fill up without a word.
    """
    chunks = _chunks(data)
    kind, header = next(chunks)
    if kind != b"IHDR" or len(header) != 13:
        raise InputError("cannot be read as a PNG: it does not begin with a header")
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
        raise InputError(f"has {width}x{height} pixels; a patch has 1 to {MAX_SIDE} each way")
    if depth > 8:
        raise InputError(f"has {depth} bits per channel; save it with 8")
    parts = list(chunks)
    if any(kind == b"IHDR" for kind, _ in parts):
        raise InputError("is damaged: it has a second header")
    if any(kind == b"acTL" for kind, _ in parts):
        raise InputError("is animated; save one image")
    expected = 0
    for top, left, down, right in ADAM7 if interlaced else ((0, 0, 1, 1),):
        rows, columns = -(-(height - top) // down), -(-(width - left) // right)
        if rows > 0 and columns > 0:
            expected += rows * (1 + (columns * depth * CHANNELS.get(colour, 0) + 7) // 8)
    stream = b"".join(content for kind, content in parts if kind == b"IDAT")
    try:
        found = len(zlib.decompressobj().decompress(stream, expected + 1))
    except zlib.error as exc:
        raise InputError(f"is damaged: {exc}") from exc
    if found != expected:
        raise InputError(f"does not hold the {width}x{height} pixels that its header declares")
    return colour, depth


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Type and content of every chunk, up to the end mark. Source: W3C PNG specification, third edition, 5.3."""
    place, kind = len(png.SIGNATURE), b""
    while kind != b"IEND":
        if place + 12 > len(data):
            raise InputError("is truncated: it ends before its end mark")
        length, kind = struct.unpack_from(">I4s", data, place)
        if place + 12 + length > len(data):
            raise InputError("is truncated: it ends before its end mark")
        content = data[place + 8 : place + 8 + length]
        (expected,) = struct.unpack_from(">I", data, place + 8 + length)
        if zlib.crc32(kind + content) != expected:
            raise InputError("is damaged: a part of it does not match its checksum")
        yield kind, content
        place += 12 + length
