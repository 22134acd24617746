from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeguard.errors import InputError
from edgeguard.report.png import SIGNATURE, encode


def decode(data: bytes) -> NDArray[np.uint8]:
    """Pixels (H, W, channels) of a PNG of ours, every checksum verified."""
    assert data.startswith(SIGNATURE)
    data, chunks = data[len(SIGNATURE) :], {}
    while data:
        (length,) = struct.unpack(">I", data[:4])
        kind, body = data[4:8], data[8 : 8 + length]
        assert struct.unpack(">I", data[8 + length : 12 + length])[0] == zlib.crc32(kind + body)
        chunks[kind], data = body, data[12 + length :]
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    width, height, depth, colour, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert (depth, rest) == (8, [0, 0, 0])
    channels = {2: 3, 6: 4}[colour]
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + width * channels)
    assert (rows[:, 0] == 0).all()
    return rows[:, 1:].reshape(height, width, channels)


@pytest.mark.parametrize("shape", [(3, 1, 1), (3, 5, 7), (3, 32, 32)])
def test_round_trip(shape: tuple[int, int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert np.array_equal(decode(encode(pixels)).transpose(2, 0, 1), pixels)
    mask = np.random.default_rng(1).random(shape[1:]) > 0.5
    decoded = decode(encode(pixels, mask))
    assert np.array_equal(decoded[..., :3].transpose(2, 0, 1), pixels)
    assert np.array_equal(decoded[..., 3], np.where(mask, 255, 0))


def test_another_decoder_agrees(tmp_path: object) -> None:
    image = pytest.importorskip("PIL.Image")
    import io

    pixels = np.random.default_rng(0).integers(0, 256, (3, 9, 4), dtype=np.uint8)
    with image.open(io.BytesIO(encode(pixels))) as opened:
        assert np.array_equal(np.asarray(opened).transpose(2, 0, 1), pixels)


def test_bad_input() -> None:
    for pixels in (np.zeros((3, 4, 4), np.float32), np.zeros((4, 4, 3), np.uint8), np.zeros((3, 0, 4), np.uint8)):
        with pytest.raises(InputError, match="PNG"):
            encode(pixels)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="mask"):
        encode(np.zeros((3, 4, 4), np.uint8), np.ones((4, 5), bool))
