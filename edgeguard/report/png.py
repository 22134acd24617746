"""Writing PNG files with the standard library.

Source: W3C PNG specification, third edition: chunks (5.3), filter type 0 (9.2), zlib stream (10).
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

from edgeguard.errors import InputError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_RGB, _RGBA = 2, 6


def encode(pixels: NDArray[np.uint8], mask: NDArray[np.bool_] | None = None) -> bytes:
    """An 8-bit RGB image as PNG.

    Args:
        pixels: (3, H, W) uint8.
        mask: (H, W) bool; where it is False the image is transparent.

    Raises:
        InputError: another shape or type.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[0] != 3 or 0 in pixels.shape:
        raise InputError(f"a PNG is made of (3, H, W) uint8 pixels, got {pixels.shape} {pixels.dtype}")
    _, height, width = pixels.shape
    rows = pixels.transpose(1, 2, 0)
    if mask is not None:
        if mask.shape != (height, width) or mask.dtype != np.bool_:
            raise InputError(f"the mask must be ({height}, {width}) bool, got {mask.shape} {mask.dtype}")
        rows = np.concatenate([rows, mask[..., None].astype(np.uint8) * np.uint8(255)], 2)
    filtered = np.concatenate([np.zeros((height, 1), np.uint8), rows.reshape(height, -1)], 1)
    header = struct.pack(">IIBBBBB", width, height, 8, _RGB if mask is None else _RGBA, 0, 0, 0)
    return (
        SIGNATURE
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", zlib.compress(filtered.tobytes(), 9))
        + _chunk(b"IEND", b"")
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
