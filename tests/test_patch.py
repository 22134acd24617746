from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeguard.errors import InputError
from edgeguard.patch import Patch, apply_patch, check_fits, grid_positions, random_positions, square

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (4, 3, 9, 7)).astype(np.uint8)
PIXELS = RNG.integers(0, 256, (3, 3, 2)).astype(np.uint8)
CORNER = np.array([[True, False], [True, True], [False, True]])


def naive(images: Any, pixels: Any, mask: Any, positions: Any) -> Any:
    result = images.copy()
    for index, (row, column) in enumerate(positions):
        own = pixels if pixels.ndim == 3 else pixels[index]
        for i, j in np.ndindex(*mask.shape):
            if mask[i, j]:
                result[index, :, row + i, column + j] = own[:, i, j]
    return result


@pytest.mark.parametrize("mask", [CORNER, np.ones((3, 2), bool)])
@pytest.mark.parametrize("each", [False, True])
def test_apply_pastes_what_the_mask_covers(mask: Any, each: bool) -> None:
    pixels = RNG.integers(0, 256, (4, 3, 3, 2)).astype(np.uint8) if each else PIXELS
    positions = np.array([[0, 0], [6, 5], [6, 0], [2, 3]])
    before = IMAGES.copy()
    got = apply_patch(IMAGES, pixels, mask, positions)
    np.testing.assert_array_equal(got, naive(IMAGES, pixels, mask, positions))
    np.testing.assert_array_equal(IMAGES, before)
    assert got.dtype == np.uint8


def test_torch_gives_the_same_and_gradients_reach_patch_and_images() -> None:
    torch = pytest.importorskip("torch")
    positions = np.array([[0, 0], [6, 5], [6, 0], [2, 3]])
    images = torch.tensor(IMAGES).float().requires_grad_()
    pixels = torch.tensor(PIXELS).float().requires_grad_()
    patched = apply_patch(images, pixels, CORNER, positions)
    np.testing.assert_array_equal(patched.detach().numpy(), apply_patch(IMAGES, PIXELS, CORNER, positions))
    patched.sum().backward()
    assert (pixels.grad.numpy() == CORNER * 4.0).all()
    expected = 1 - apply_patch(np.zeros_like(IMAGES), np.ones_like(PIXELS), CORNER, positions)
    np.testing.assert_array_equal(images.grad.numpy(), expected)


@pytest.mark.parametrize(
    "positions",
    [[[0, 0]], [[7, 0]] * 4, [[0, 6]] * 4, [[-1, 0]] * 4, [[0, 0, 0]] * 4],
    ids=["count", "bottom", "right", "negative", "shape"],
)
def test_patches_stay_inside(positions: Any) -> None:
    with pytest.raises(InputError, match=r"positions must be \(4, 2\), between 0 and \[6, 5\]"):
        apply_patch(IMAGES, PIXELS, CORNER, np.array(positions))


def test_patches_larger_than_the_image_are_refused() -> None:
    check_fits((9, 7), (9, 7))
    for size in ((10, 7), (9, 8)):
        with pytest.raises(InputError, match="larger than the image, 9x7"):
            check_fits(size, (9, 7))
    with pytest.raises(InputError, match="larger"):
        apply_patch(IMAGES, np.zeros((3, 10, 2), np.uint8), np.ones((10, 2), bool), np.zeros((4, 2), np.int64))


def test_random_positions_cover_every_place_and_repeat_with_the_seed() -> None:
    draw = [random_positions(2000, (9, 7), (3, 2), np.random.default_rng(1)) for _ in range(2)]
    np.testing.assert_array_equal(draw[0], draw[1])
    assert {tuple(place) for place in draw[0]} == {(r, c) for r in range(7) for c in range(6)}


def test_grid_positions() -> None:
    assert len(grid_positions((9, 7), (3, 2), 1)) == 7 * 6
    rows, columns = (sorted(set(axis.tolist())) for axis in grid_positions((9, 7), (3, 2), 4).T)
    assert rows == [0, 4, 6]
    assert columns == [0, 4, 5]
    assert grid_positions((9, 7), (9, 7), 3).tolist() == [[0, 0]]
    with pytest.raises(InputError, match="stride must be at least 1, got 0"):
        grid_positions((9, 7), (3, 2), 0)


def test_save_and_load(tmp_path: Path) -> None:
    patch = Patch(PIXELS, CORNER)
    patch.save(tmp_path / "a.npz")
    patch.save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    loaded = Patch.load(tmp_path / "a.npz")
    np.testing.assert_array_equal(loaded.pixels, PIXELS)
    np.testing.assert_array_equal(loaded.mask, CORNER)
    assert loaded.size == (3, 2)


def test_a_file_without_a_mask_covers_all(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", pixels=PIXELS)
    assert Patch.load(tmp_path / "a.npz").mask.all()
    assert square(PIXELS).mask.shape == (3, 2)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pixels": PIXELS.astype(np.float32)}, r"must be \(3, h, w\) uint8, got \(3, 3, 2\) float32"),
        ({"pixels": PIXELS[:2]}, r"must be \(3, h, w\)"),
        ({"pixels": PIXELS[0]}, r"must be \(3, h, w\)"),
        ({"pixels": np.zeros((), np.uint8)}, r"must be \(3, h, w\)"),
        ({"pixels": PIXELS, "mask": np.zeros((3, 2), bool)}, "not all False"),
        ({"pixels": PIXELS, "mask": np.ones((2, 3), bool)}, "mask of that shape"),
        ({"pixels": PIXELS, "mask": np.ones((3, 2))}, "boolean mask"),
        ({"image": PIXELS}, "no array 'pixels'"),
    ],
)
def test_what_is_no_patch_is_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=f"a.npz.*{message}"):
        Patch.load(tmp_path / "a.npz")


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        Patch.load(tmp_path / "missing.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(InputError, match="not a readable npz"):
        Patch.load(tmp_path / "text.npz")
    np.savez_compressed(tmp_path / "big.npz", pixels=np.zeros((3, 1000, 1000), np.uint8))
    with pytest.raises(InputError, match="unpacks to more than 1000000 bytes"):
        Patch.load(tmp_path / "big.npz", limit=1_000_000)


def test_a_patch_without_rows_makes_no_mask_of_petabytes(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", pixels=np.zeros((0, 10**9, 10**9), np.uint8))
    with pytest.raises(InputError, match="patch pixels must be"):
        Patch.load(tmp_path / "a.npz")
