from __future__ import annotations

import math
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeguard.data import decode
from edgeguard.data.decode import DRAWS, crop_box, read_centre, read_crop, read_whole, resized_side
from edgeguard.errors import InputError

Image = pytest.importorskip("PIL.Image")


def noise(width: int, height: int) -> Any:
    return Image.fromarray(np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8))


def draws(seed: int = 0) -> Any:
    return np.random.default_rng(seed).random(DRAWS)


@pytest.mark.parametrize(("image_size", "side"), [(224, 256), (299, 342), (384, 439), (128, 146), (127, 127), (32, 32)])
def test_the_side_before_the_centre_is_cut_out(image_size: int, side: int) -> None:
    assert resized_side(image_size) == side


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
@pytest.mark.parametrize(
    "size", [(500, 375), (333, 501), (641, 479), (256, 256), (225, 224), (40, 30), (1, 1), (1, 700), (900, 2)]
)
def test_the_centre_is_torchvisions_to_one_grey_level(tmp_path: Path, size: tuple[int, int], name: str) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    noise(*size).save(tmp_path / name)
    got = read_centre(tmp_path / name, 224)
    recipe = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.PILToTensor()])
    with Image.open(tmp_path / name) as image:
        wanted = recipe(image).numpy()
    assert got.shape == wanted.shape == (3, 224, 224)
    assert np.abs(got.astype(int) - wanted.astype(int)).max() <= 1


def test_an_image_of_the_right_size_is_taken_as_it_is(tmp_path: Path) -> None:
    noise(128, 128).save(tmp_path / "a.png")
    assert np.array_equal(read_centre(tmp_path / "a.png", 128), np.asarray(noise(128, 128)).transpose(2, 0, 1))
    assert np.array_equal(read_whole(tmp_path / "a.png", (128, 128)), read_centre(tmp_path / "a.png", 128))


def test_crops_keep_to_the_areas_and_ratios() -> None:
    boxes = np.array([crop_box((500, 375), draws(seed)) for seed in range(500)])
    wide, tall = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes[:, :2].min() == 0
    assert boxes[:, 2].max() == 500
    assert boxes[:, 3].max() == 375
    shares, ratios = wide * tall / (500 * 375), wide / tall
    assert decode.CROP_AREA[0] * 0.99 < shares.min() < 0.28
    assert 0.9 < shares.max() <= 1
    assert 0.74 < ratios.min() < 0.78
    assert 1.28 < ratios.max() < 1.35
    assert abs(np.log(ratios).mean()) < 0.05


@pytest.mark.parametrize(
    ("size", "box"),
    [((1, 1), (0, 0, 1, 1)), ((1, 100), (0, 49, 1, 50)), ((100, 1), (49, 0, 50, 1)), ((1000, 9), (494, 0, 506, 9))],
)
def test_where_no_crop_fits_the_middle_is_taken(size: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    assert {crop_box(size, draws(seed)) for seed in range(20)} == {box}


def test_every_draw_counts() -> None:
    plain = np.full(DRAWS, 0.5)
    boxes = [crop_box((300, 300), plain)]
    for index in (0, 1, DRAWS - 3, DRAWS - 2):
        changed = plain.copy()
        changed[index] = 0.1
        boxes.append(crop_box((300, 300), changed))
    assert len(set(boxes)) == 5


def ramp(width: int, height: int) -> Any:
    """Red grows to the right, green downwards, from 0 to 255."""
    x, y = np.meshgrid(np.arange(width) * 255 / (width - 1), np.arange(height) * 255 / (height - 1))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 128)], 2).round().astype(np.uint8))


@pytest.mark.parametrize(("name", "size"), [("a.png", (300, 200)), ("a.png", (800, 600)), ("a.jpg", (800, 600))])
def test_a_crop_shows_the_pixels_of_its_box(tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    ramp(*size).save(tmp_path / name, **({"quality": 98, "subsampling": 0} if name == "a.jpg" else {}))
    for seed in range(6):
        left, top, right, bottom = crop_box(size, draws(seed))
        pixels = read_crop(tmp_path / name, 128, draws(seed), flip=False)
        assert pixels.shape == (3, 128, 128)
        step = (right - left) / 128, (bottom - top) / 128
        for column, row in ((0, 0), (127, 127), (64, 30)):
            x, y = left + (column + 0.5) * step[0] - 0.5, top + (row + 0.5) * step[1] - 0.5
            wanted = (x * 255 / (size[0] - 1), y * 255 / (size[1] - 1), 128)
            assert np.abs(pixels[:, row, column] - np.array(wanted)).max() < 3


def test_large_jpegs_are_decoded_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL.JpegImagePlugin import JpegImageFile

    ramp(800, 600).save(tmp_path / "a.jpg")
    decoded: list[tuple[int, int]] = []
    real = JpegImageFile.load_prepare

    def noted(self: Any) -> None:
        decoded.append(self.size)
        real(self)

    monkeypatch.setattr(JpegImageFile, "load_prepare", noted)
    for seed in range(8):
        read_crop(tmp_path / "a.jpg", 128, draws(seed), flip=False)
    read_centre(tmp_path / "a.jpg", 128)
    assert decoded[-1] == (800, 600)
    assert set(decoded[:-1]) <= {(400, 300), (200, 150)}


def test_the_draws_decide_everything(tmp_path: Path) -> None:
    noise(200, 150).save(tmp_path / "a.jpg")
    images = [read_crop(tmp_path / "a.jpg", 128, draws(seed), flip=True) for seed in (0, 0, 1)]
    assert np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])
    mirrored = 0
    for seed in range(40):
        once, never = (read_crop(tmp_path / "a.jpg", 128, draws(seed), flip) for flip in (True, False))
        mirrored += np.array_equal(once, never[:, :, ::-1])
        assert np.array_equal(once, never) != np.array_equal(once, never[:, :, ::-1])
    assert 10 < mirrored < 30


def test_crops_are_antialiased(tmp_path: Path) -> None:
    board = np.indices((512, 512)).sum(0) % 2 * 255
    Image.fromarray(np.repeat(board[..., None], 3, 2).astype(np.uint8)).save(tmp_path / "a.png")
    pixels = np.concatenate([read_crop(tmp_path / "a.png", 64, draws(seed), False) for seed in range(5)])
    assert np.abs(pixels.astype(int) - 127).max() < 40
    assert np.abs(read_centre(tmp_path / "a.png", 128).astype(int) - 127).max() < 40


READERS: dict[str, Callable[[Path], Any]] = {
    "whole": lambda path: read_whole(path, (8, 8)),
    "centre": lambda path: read_centre(path, 6),
    "crop": lambda path: read_crop(path, 6, draws(), False),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("mode", "color", "rgb"),
    [
        ("L", 70, (70, 70, 70)),
        ("1", 1, (255, 255, 255)),
        ("LA", (70, 0), (70, 70, 70)),
        ("RGBA", (10, 200, 90, 0), (10, 200, 90)),
        ("P", 3, (40, 50, 60)),
    ],
)
def test_png_modes(tmp_path: Path, reader: str, mode: str, color: Any, rgb: tuple[int, ...]) -> None:
    image = Image.new(mode, (8, 8), color)
    if mode == "P":
        image.putpalette([0] * 9 + [40, 50, 60])
    image.save(tmp_path / "a.png", **({"transparency": b"\1\2\3\4"} if mode == "P" else {}))
    pixels = READERS[reader](tmp_path / "a.png")
    assert (pixels == np.array(rgb).reshape(3, 1, 1)).all()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("mode", "color"), [("CMYK", (0, 255, 255, 0)), ("L", 90)])
def test_jpeg_modes(tmp_path: Path, reader: str, mode: str, color: Any) -> None:
    Image.new(mode, (8, 8), color).save(tmp_path / "a.jpg", quality=100)
    wanted = (255, 0, 0) if mode == "CMYK" else (90, 90, 90)
    assert np.abs(READERS[reader](tmp_path / "a.jpg") - np.array(wanted).reshape(3, 1, 1)).max() <= 4


def png(width: int, height: int, depth: int, kind: int, rows: bytes) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("reader", READERS)
def test_sixteen_bits_per_colour_keep_the_upper_eight_and_grey_is_refused(tmp_path: Path, reader: str) -> None:
    row = b"\0" + struct.pack(">3H", 0x1234, 0x5678, 0x9AFF) * 8
    (tmp_path / "a.png").write_bytes(png(8, 8, 16, 2, row * 8))
    assert (READERS[reader](tmp_path / "a.png") == np.array([0x12, 0x56, 0x9A]).reshape(3, 1, 1)).all()
    (tmp_path / "b.png").write_bytes(png(8, 8, 16, 0, (b"\0" + bytes(16)) * 8))
    with pytest.raises(InputError, match=r"b\.png is of mode I;16; expected 8 bits per channel: convert the file"):
        READERS[reader](tmp_path / "b.png")


@pytest.mark.parametrize("reader", READERS)
def test_exif_rotation_is_not_applied(tmp_path: Path, reader: str) -> None:
    image = ramp(8, 8)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as stored:
        assert stored.getexif()[0x0112] == 6
    assert np.array_equal(READERS[reader](tmp_path / "plain.png"), READERS[reader](tmp_path / "turned.png"))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.bmp"])
def test_damaged_files_are_named(tmp_path: Path, reader: str, name: str) -> None:
    noise(8, 8).save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"text", whole[:20]):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"{name[:-4]}.* cannot be read as an image") as caught:
            READERS[reader](tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("reader", READERS)
def test_missing_files_folders_and_other_formats_are_named(tmp_path: Path, reader: str) -> None:
    (tmp_path / "folder.png").mkdir()
    noise(8, 8).save(tmp_path / "gif.png", format="GIF")
    for name in ("none.png", "folder.png", "gif.png"):
        with pytest.raises(InputError, match=f"{name} cannot be read as an image"):
            READERS[reader](tmp_path / name)


@pytest.mark.parametrize("reader", READERS)
def test_too_many_pixels_or_too_long_a_side(tmp_path: Path, reader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(png(70_000, 1, 8, 0, bytes(70_001)))
    with pytest.raises(InputError, match=r"a\.png has 70000x1 pixels; at most 67108864, and 65535 a side, are read"):
        READERS[reader](tmp_path / "a.png")
    noise(8, 8).save(tmp_path / "b.png")
    READERS[reader](tmp_path / "b.png")
    monkeypatch.setattr(decode, "MAX_PIXELS", 63)
    with pytest.raises(InputError, match=r"b\.png has 8x8 pixels; at most 63"):
        READERS[reader](tmp_path / "b.png")


def test_the_longest_image_is_cut_without_growing_the_rest(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(65_535, 1, 8, 0, b"\0" + bytes([9]) * 65_535))
    assert (read_centre(tmp_path / "a.png", 224) == 9).all()  # resized as a whole: 256 x 16,776,960 pixels
    assert (read_crop(tmp_path / "a.png", 224, draws(), False) == 9).all()


def test_all_draws_are_used_up_to_the_last_try() -> None:
    """A frame that only the last try fits."""
    chosen = np.full(DRAWS, 0.999)
    chosen[2 * decode.TRIES - 2] = 0.0
    chosen[2 * decode.TRIES - 1] = 0.5
    box = crop_box((400, 100), chosen)
    wide, tall = box[2] - box[0], box[3] - box[1]
    assert (wide, tall) == (100, 100)
    assert box[0] == math.floor(0.999 * 301)


LARGE = """
import re, sys
from pathlib import Path
import numpy as np
from edgeguard.data.folder import load_folder
load_folder(Path(sys.argv[1]), "test", 32, threads=4).images(np.arange(4))
print(int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
"""
"""Not `ru_maxrss`: a process begins with what its parent had."""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_many_threads_decode_no_more_at_a_time_than_one_large_image_has(tmp_path: Path) -> None:
    """Four images of 64 million pixels each, which would be more than a gigabyte at once."""
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.png").write_bytes(png(8192, 8192, 8, 0, bytes(8193 * 8192)))
    for number in range(1, 4):
        os.link(tmp_path / "cat" / "0.png", tmp_path / "cat" / f"{number}.png")
    done = subprocess.run([sys.executable, "-c", LARGE, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 450, f"{done.stdout} MiB"


def test_an_image_in_strips_is_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise(33, 50).convert("P").save(tmp_path / "a.png", transparency=3)
    whole = read_whole(tmp_path / "a.png", (50, 33))
    monkeypatch.setattr(decode, "STRIP", 33 * 7)
    assert np.array_equal(read_whole(tmp_path / "a.png", (50, 33)), whole)


def test_formats_whose_decoder_makes_copies_may_have_fewer_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_PIXELS", 100)
    for name in ("a.png", "a.webp"):
        noise(8, 8).save(tmp_path / name)
    read_whole(tmp_path / "a.png", (8, 8))
    with pytest.raises(InputError, match=r"a\.webp has 8x8 pixels; at most 50"):
        read_whole(tmp_path / "a.webp", (8, 8))


def test_large_files_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise(8, 8).save(tmp_path / "a.png")
    monkeypatch.setattr(decode, "MAX_BYTES", 50)
    with pytest.raises(InputError, match=r"a\.png has \d+ bytes; images of at most 50 are read"):
        read_whole(tmp_path / "a.png", (8, 8))
