"""Patches from PNG files, hostile ones among them, and patches on paper."""

from __future__ import annotations

import io
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeguard.errors import InputError
from edgeguard.patch import Patch, square
from edgeguard.patch_files import ADAM7, MAX_SIDE, PAPERS, load_patch, save_pdf, save_png

Image = pytest.importorskip("PIL.Image")

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (3, 5, 7)).astype(np.uint8)
MASK = RNG.random((5, 7)) > 0.3
HOLES, WHOLE = Patch(PIXELS, MASK), square(PIXELS)
GREY = PIXELS[0]


def same(got: Patch, expected: Patch) -> None:
    np.testing.assert_array_equal(got.pixels, expected.pixels)
    np.testing.assert_array_equal(got.mask, expected.mask)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def raw(width: int, height: int, depth: int = 8, colour: int = 2, rows: bytes = b"", extra: bytes = b"") -> bytes:
    """A PNG of any header."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def encoded(image: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("patch", [HOLES, WHOLE], ids=["holes", "whole"])
def test_npz_to_png_and_back_is_the_same_patch(tmp_path: Path, patch: Patch) -> None:
    patch.save(tmp_path / "a.npz")
    first = load_patch(tmp_path / "a.npz")
    save_png(first, tmp_path / "a.png")
    same(load_patch(tmp_path / "a.png"), patch)
    save_png(patch, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert load_patch(tmp_path / "b.png").sha256 == first.sha256


def test_the_content_decides_and_not_the_name(tmp_path: Path) -> None:
    HOLES.save(tmp_path / "a.png")
    same(load_patch(tmp_path / "a.png"), HOLES)


def test_an_enlarged_png_has_a_square_for_each_pixel(tmp_path: Path) -> None:
    save_png(HOLES, tmp_path / "a.png", enlarge=3)
    big = load_patch(tmp_path / "a.png")
    assert big.size == (15, 21)
    for row in range(3):
        same(Patch(big.pixels[:, row::3, row::3], big.mask[row::3, row::3]), HOLES)
    for enlarge in (0, MAX_SIDE // 7 + 1):
        with pytest.raises(InputError, match=f"a patch of 5x7 pixels can be enlarged 1 to 585 times, got {enlarge}"):
            save_png(HOLES, tmp_path / "b.png", enlarge)


def test_every_part_of_a_patch_changes_its_digest() -> None:
    others = [square(PIXELS ^ np.uint8(1)), HOLES, square(PIXELS.reshape(3, 7, 5)), WHOLE]
    assert len({patch.sha256 for patch in others}) == 4


def test_an_interlaced_png(tmp_path: Path) -> None:
    """Pillow writes none, so one pass after the other is put together here."""
    for width, height in ((7, 5), (1, 1), (9, 2)):
        pixels = RNG.integers(0, 256, (height, width, 3)).astype(np.uint8)
        rows = [
            b"\0" + line.tobytes()
            for top, left, down, right in ADAM7
            for line in pixels[top::down, left::right]
            if line.size
        ]
        data = bytearray(raw(width, height, rows=b"".join(rows)))
        data[28] = 1
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        (tmp_path / "a.png").write_bytes(data)
        same(load_patch(tmp_path / "a.png"), square(pixels.transpose(2, 0, 1).copy()))


@pytest.mark.parametrize(
    ("image", "options", "pixels", "mask"),
    [
        (Image.fromarray(PIXELS.transpose(1, 2, 0).copy()), {}, PIXELS, None),
        (Image.fromarray(GREY.copy()), {}, np.stack([GREY] * 3), None),
        (Image.fromarray(GREY > 99), {}, np.stack([(GREY > 99) * np.uint8(255)] * 3), None),
        (Image.fromarray(np.dstack([GREY, MASK * np.uint8(255)])), {}, np.stack([GREY] * 3), MASK),
        (Image.fromarray(GREY.copy()), {"transparency": int(GREY[2, 2])}, np.stack([GREY] * 3), GREY[2, 2] != GREY),
    ],
    ids=["rgb", "grey", "bits", "grey-alpha", "transparent-grey"],
)
def test_kinds_of_png(tmp_path: Path, image: Any, options: Any, pixels: Any, mask: Any) -> None:
    (tmp_path / "a.png").write_bytes(encoded(image, **options))
    same(load_patch(tmp_path / "a.png"), Patch(pixels, np.ones((5, 7), bool) if mask is None else mask))


def test_a_palette_with_a_transparent_colour(tmp_path: Path) -> None:
    image = Image.fromarray((GREY % 4).copy()).convert("P")
    image.putpalette([*(10, 20, 30), *(40, 50, 60), *(70, 80, 90), *(1, 2, 3)])
    (tmp_path / "a.png").write_bytes(encoded(image, transparency=2))
    index = np.asarray(image)
    palette = np.array(image.getpalette()[:12], np.uint8).reshape(4, 3)
    same(load_patch(tmp_path / "a.png"), Patch(palette[index].transpose(2, 0, 1).copy(), index != 2))


def test_alpha_covers_from_128_on(tmp_path: Path) -> None:
    alpha = np.array([[0, 1, 127, 128, 129, 255, 200]] * 5, np.uint8)
    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(np.dstack([*PIXELS, alpha]))))
    same(load_patch(tmp_path / "a.png"), Patch(PIXELS, alpha >= 128))


GOOD = encoded(Image.fromarray(PIXELS.transpose(1, 2, 0).copy()))
CLEAR = encoded(Image.fromarray(np.dstack([*PIXELS, np.full((5, 7), 127, np.uint8)])))
ROW = bytes(1 + 3 * 7)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is no patch file: expected an npz file or a PNG"),
        (b"\xff\xd8\xff\xe0 a JPEG", "is no patch file"),
        (b"PK but no archive", "is not a readable npz file"),
        (GOOD[:20], "is truncated"),
        (GOOD[:-1], "is truncated"),
        (GOOD[:8], "is truncated"),
        (GOOD[:-30] + b"\x00" + GOOD[-29:], "is damaged|is truncated"),
        (raw(7, 5, rows=ROW * 3), "does not hold the 7x5 pixels that its header declares"),
        (raw(7, 5, depth=16, rows=bytes(1 + 6 * 7) * 5), "has 16 bits per channel; save it with 8"),
        (raw(50_000, 50_000, rows=b"\x00" * 1000), "has 50000x50000 pixels; a patch has 1 to 4096 each way"),
        (raw(0, 5), "has 0x5 pixels"),
        (raw(7, 5, rows=ROW * 6), "does not hold the 7x5 pixels"),
        (raw(7, 5, rows=ROW * 5).replace(zlib.compress(ROW * 5), b"no zlib stream"[:13]), "is damaged|is truncated"),
        (raw(7, 5, colour=5, rows=bytes(5)), "cannot be read as a PNG"),
        (raw(7, 5, rows=ROW * 5, extra=chunk(b"acTL", bytes(8))), "is animated"),
        (raw(7, 5, rows=ROW * 5, extra=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(70 << 20)))), "cannot be read"),
        (raw(7, 5, 2, 0, bytes(3) * 5, chunk(b"tRNS", b"\0\x02")), "grey of fewer than 8 bits with a transparent level"),
        (chunk(b"IDAT", b""), "is no patch file"),
        (GOOD[:8] + chunk(b"IDAT", b""), "does not begin with a header"),
        (CLEAR, "every pixel is transparent"),
    ],
    ids=[
        "empty", "jpeg", "zip", "header", "end", "signature", "checksum", "few-rows", "many-rows", "stream", "16-bit", "bomb",
        "zero", "colour", "animated", "text-bomb", "levels", "headless", "headless-png", "transparent",
    ],
)
def test_what_is_no_patch_is_refused_in_one_sentence(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(InputError, match=f"a.png:? .*({message})") as caught:
        load_patch(tmp_path / "a.png")
    assert "\n" not in str(caught.value)


def test_any_flipped_byte_of_a_png_is_seen_or_harmless(tmp_path: Path) -> None:
    """Each part is under a checksum, so a damaged file never becomes another patch."""
    path = tmp_path / "a.png"
    for place in range(len(GOOD)):
        path.write_bytes(GOOD[:place] + bytes([GOOD[place] ^ 0x40]) + GOOD[place + 1 :])
        with pytest.raises(InputError):
            load_patch(path)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_patch(tmp_path / "a.png")
    with pytest.raises(InputError, match="is not a file"):
        load_patch(tmp_path)


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as handle:
        handle.write(GOOD)
        handle.truncate(65 << 20)
    with pytest.raises(InputError, match="bytes; a PNG of at most"):
        load_patch(tmp_path / "a.png")


def streams(data: bytes) -> list[bytes]:
    """Every compressed stream of a PDF."""
    found = []
    for match in re.finditer(rb"/FlateDecode.*?stream\r?\n(.*?)\r?\nendstream", data, re.DOTALL):
        found.append(zlib.decompressobj().decompress(match[1]))
    return found


def content(data: bytes) -> str:
    (found,) = (stream for stream in streams(data) if b" Do" in stream)
    return found.decode("latin-1")


MM = 72 / 25.4
NUMBER = r"(-?[\d.]+)"


@pytest.mark.parametrize("paper", PAPERS)
@pytest.mark.parametrize("patch", [HOLES, WHOLE], ids=["holes", "whole"])
def test_the_printed_patch_has_its_real_size(tmp_path: Path, paper: str, patch: Patch) -> None:
    pytest.importorskip("matplotlib")
    save_pdf(patch, tmp_path / "a.pdf", 84.0, paper)
    data = (tmp_path / "a.pdf").read_bytes()
    box = re.search(rb"/MediaBox \[ 0 0 ([\d.]+) ([\d.]+) \]", data)
    assert box is not None
    page = [float(side) for side in box.groups()]
    assert page == pytest.approx([side * MM for side in PAPERS[paper]], abs=0.01)

    numbers = " ".join([NUMBER] * 6)
    placed = re.search(rf"q 1 0 0 1 {NUMBER}\s+{NUMBER}\s+cm\s+{numbers}\s+cm\s+/I1\s+Do".replace(" ", r"\s+"), content(data))
    assert placed is not None
    left, bottom, width, b, c, height, shift_x, shift_y = (float(number) for number in placed.groups())
    assert (b, c, shift_x) == (0, 0, 0)
    assert height < 0
    assert width == pytest.approx(84 * MM, abs=1e-3)
    assert height == pytest.approx(-60 * MM, abs=1e-3)
    assert left == pytest.approx((page[0] - width) / 2, abs=1e-3)
    assert shift_y == pytest.approx(-height, abs=1e-3)
    assert 30 * MM < bottom < page[1] - 100 * MM


def printed(data: bytes) -> dict[int, Any]:
    """Images of a PDF by their channels: 3 colours, 1 alpha. Their streams are those of PNG files."""
    found = {}
    for match in re.finditer(rb"<< /Type /XObject(.*?)>>\nstream\r?\n(.*?)\r?\nendstream", data, re.DOTALL):
        numbers = {key: int(re.search(rb"/%s (\d+)" % key, match[1])[1]) for key in (b"Width", b"Height", b"Colors")}  # type: ignore[index]
        rows = zlib.decompress(match[2])
        colour = {1: 0, 3: 2}[numbers[b"Colors"]]
        image = Image.open(io.BytesIO(raw(numbers[b"Width"], numbers[b"Height"], 8, colour, rows)))
        found[numbers[b"Colors"]] = np.asarray(image)
    return found


def test_every_pixel_is_printed_as_a_square_of_its_colour(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    mask = RNG.random((20, 18)) > 0.2
    patch = Patch(RNG.integers(0, 256, (3, 20, 18)).astype(np.uint8), mask)
    save_pdf(patch, tmp_path / "a.pdf", 30.0)
    images = printed((tmp_path / "a.pdf").read_bytes())
    times = len(images[3]) // 20
    assert times * 20 / (30 / 25.4) >= 300
    colours = np.where(mask, patch.pixels, 255).transpose(1, 2, 0)
    # The page turns images upside down, and the content stream turns them back.
    np.testing.assert_array_equal(images[3][::-1], colours.repeat(times, 0).repeat(times, 1))
    np.testing.assert_array_equal(images[1][::-1], (mask * np.uint8(255)).repeat(times, 0).repeat(times, 1))
    save_pdf(square(patch.pixels), tmp_path / "b.pdf", 30.0)
    assert printed((tmp_path / "b.pdf").read_bytes()).keys() == {3}


def test_rulers_and_text(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    save_pdf(HOLES, tmp_path / "a.pdf", 84.0)
    page = content((tmp_path / "a.pdf").read_bytes())
    lines = [
        tuple(float(number) for number in match)
        for match in re.findall(rf"{NUMBER} {NUMBER} m\n{NUMBER} {NUMBER} l", page)
    ]
    lengths = [max(abs(x1 - x0), abs(y1 - y0)) / MM for x0, y0, x1, y1 in lines]
    assert sum(length == pytest.approx(100, abs=1e-3) for length in lengths) == 2
    assert len(lines) == 1 + 2 * 101 + 2 + 8  # the page's own outline is the first
    low = sorted({round(x0 / MM, 3) for x0, y0, x1, y1 in lines if x0 == x1 and y0 < 20 * MM})
    assert np.diff(low) == pytest.approx(np.ones(100), abs=2e-3)
    assert "Print at 100 %" in page
    assert r"84.00 x 60.00 mm" in page
    assert "7 x 5 pixels; cut out" in page
    assert HOLES.sha256 in page


def test_equal_arguments_give_equal_bytes_in_other_processes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    WHOLE.save(tmp_path / "patch.npz")
    code = (
        "import sys, pathlib; from edgeguard.patch_files import load_patch, save_pdf\n"
        "save_pdf(load_patch(pathlib.Path(sys.argv[1])), pathlib.Path(sys.argv[2]), 50.0)"
    )
    (tmp_path / "matplotlibrc").write_text("savefig.bbox: tight\naxes.facecolor: red\nlines.linewidth: 9\n")
    command = [sys.executable, "-c", code, "patch.npz", "other.pdf"]
    subprocess.run(command, cwd=tmp_path, check=True, env={"PYTHONHASHSEED": "5", "HOME": str(tmp_path)}, capture_output=True)
    save_pdf(WHOLE, tmp_path / "own.pdf", 50.0)
    assert (tmp_path / "own.pdf").read_bytes() == (tmp_path / "other.pdf").read_bytes()
    assert b"CreationDate" not in (tmp_path / "own.pdf").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda patch, path: save_pdf(patch, path, 0.0), "longer side of 1 to 146.0 mm, got 0.0"),
        (lambda patch, path: save_pdf(patch, path, float("nan")), "got nan"),
        (lambda patch, path: save_pdf(patch, path, 147.0), "5x7 pixels fits a4 .* got 147"),
        (lambda patch, path: save_pdf(patch, path, 50.0, "a3"), "unknown paper 'a3'; expected a4 or letter"),
        (lambda patch, path: save_pdf(patch, path / "none" / "a.pdf", 50.0), "cannot write"),
    ],
    ids=["zero", "nan", "large", "paper", "folder"],
)
def test_what_cannot_be_printed_is_refused(tmp_path: Path, change: Callable[[Patch, Path], None], message: str) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(InputError, match=message):
        change(HOLES, tmp_path / "a.pdf")
    assert not list(tmp_path.iterdir())
