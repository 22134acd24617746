from __future__ import annotations

import os
import sys
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeguard.data import batches, has_splits, holdout, load_dataset, load_splits
from edgeguard.data import folder as folder_module
from edgeguard.errors import InputError, MissingDependency

Image = pytest.importorskip("PIL.Image")


def write(path: Path, color: tuple[int, int, int] = (10, 20, 30), size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def flat(root: Path) -> Path:
    write(root / "cat" / "b.png", (1, 2, 3))
    write(root / "cat" / "a.png", (4, 5, 6))
    write(root / "dog" / "deep" / "c.png", (7, 8, 9))
    (root / "cat" / "notes.txt").write_text("no image")
    return root


def test_one_folder_is_one_set(tmp_path: Path) -> None:
    spec = f"imagefolder:{flat(tmp_path)}"
    dataset = load_dataset(spec, "test")
    assert dataset.class_names == ("cat", "dog")
    assert dataset.labels.tolist() == [0, 0, 1]
    assert dataset.image_shape == (3, 8, 8)
    images = dataset.images([0, 1, 2])
    assert images.dtype == np.uint8
    assert images[:, :, 0, 0].tolist() == [[4, 5, 6], [1, 2, 3], [7, 8, 9]]
    assert dataset.subset([2]).images([0])[0, :, 3, 3].tolist() == [7, 8, 9]
    assert not has_splits(spec)


@pytest.mark.parametrize("name", ["test", "val"])
def test_train_and_test_folders(tmp_path: Path, name: str) -> None:
    flat(tmp_path / "train")
    write(tmp_path / name / "dog" / "x.jpg")
    spec = f"imagefolder:{tmp_path}"
    assert has_splits(spec)
    train, test = load_splits(spec)
    assert (len(train), len(test)) == (3, 1)
    assert test.class_names == ("cat", "dog")
    assert test.labels.tolist() == [1]


def test_test_is_preferred_to_val(tmp_path: Path) -> None:
    flat(tmp_path / "train")
    write(tmp_path / "val" / "cat" / "x.png")
    write(tmp_path / "test" / "dog" / "x.png")
    assert load_dataset(f"imagefolder:{tmp_path}", "test").labels.tolist() == [1]


def test_a_missing_split_is_named(tmp_path: Path) -> None:
    flat(tmp_path / "train")
    spec = f"imagefolder:{tmp_path}"
    assert not has_splits(spec)
    with pytest.raises(InputError, match="no folder test or val with class folders in it, only train"):
        load_dataset(spec, "test")
    write(tmp_path / "train" / "dog" / "second.png")
    train, test = load_splits(spec, fraction=0.5, seed=1)
    assert (len(train), len(test)) == (2, 2)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    write(tmp_path / "bus" / "a.png")
    write(tmp_path / "train" / "a.png")
    assert load_dataset(f"imagefolder:{tmp_path}", "test").class_names == ("bus", "train")


def test_unknown_class_in_the_test_folder(tmp_path: Path) -> None:
    flat(tmp_path / "train")
    write(tmp_path / "test" / "owl" / "a.png")
    with pytest.raises(InputError, match="owl is a class that the training images do not have"):
        load_dataset(f"imagefolder:{tmp_path}", "test")


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none does not exist"):
        load_dataset(f"imagefolder:{tmp_path}/none", "test")
    with pytest.raises(InputError, match="has no class folders"):
        load_dataset(f"imagefolder:{tmp_path}", "test")
    write(tmp_path / "loose.png")
    with pytest.raises(InputError, match="has no class folders"):
        load_dataset(f"imagefolder:{tmp_path}", "test")
    with pytest.raises(InputError, match="is not a folder"):
        load_dataset(f"imagefolder:{tmp_path}/loose.png", "test")
    (tmp_path / "cat").mkdir()
    with pytest.raises(InputError, match=r"cat holds no images; looked for \.bmp"):
        load_dataset(f"imagefolder:{tmp_path}", "test")


def test_mixed_sizes_name_two_files(tmp_path: Path) -> None:
    write(tmp_path / "cat" / "a.png")
    write(tmp_path / "cat" / "b.png", size=(9, 8))
    with pytest.raises(InputError, match=r"a\.png is 8x8, .*b\.png is 9x8; give an image size"):
        load_dataset(f"imagefolder:{tmp_path}", "test")
    dataset = load_dataset(f"imagefolder:{tmp_path}", "test", 6)
    assert dataset.images([0, 1]).shape == (2, 3, 6, 6)


def test_image_size_resizes_the_shorter_side_and_cuts_the_centre(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 200
    Image.fromarray(wide).save(tmp_path / "cat" / "a.png")
    image = load_dataset(f"imagefolder:{tmp_path}", "test", 8).images([0])[0]
    assert (image == 200).all()
    half = load_dataset(f"imagefolder:{tmp_path}", "test", 4).images([0])[0]
    assert half.shape == (3, 4, 4)
    assert half[:, :, 1:3].min() == 200
    with pytest.raises(InputError, match="between 1 and 4096"):
        load_dataset(f"imagefolder:{tmp_path}", "test", 0)


def test_unreadable_images_are_named(tmp_path: Path) -> None:
    flat(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "cat" / "cut.png")
    whole = (tmp_path / "cat" / "cut.png").read_bytes()
    (tmp_path / "cat" / "cut.png").write_bytes(whole[:-60])
    dataset = load_dataset(f"imagefolder:{tmp_path}", "test")
    with pytest.raises(InputError, match=r"cut\.png cannot be read as an image"):
        dataset.images([0, 1, 2, 3])
    (tmp_path / "cat" / "cut.png").write_bytes(b"not a png")
    with pytest.raises(InputError, match=r"cut\.png cannot be read as an image"):
        load_dataset(f"imagefolder:{tmp_path}", "test")


def test_a_file_that_changes_later_is_named(tmp_path: Path) -> None:
    dataset = load_dataset(f"imagefolder:{flat(tmp_path)}", "test")
    write(tmp_path / "cat" / "a.png", size=(5, 5))
    with pytest.raises(InputError, match=r"a\.png is now 5x5, but was 8x8"):
        dataset.images([0])
    (tmp_path / "cat" / "a.png").unlink()
    with pytest.raises(InputError, match=r"a\.png cannot be read"):
        dataset.images([0])


def test_a_huge_image_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeguard.data.decode.MAX_PIXELS", 100)
    write(tmp_path / "cat" / "a.png", size=(11, 10))
    with pytest.raises(InputError, match="has 11x10 pixels; at most 100"):
        load_dataset(f"imagefolder:{tmp_path}", "test")


def test_an_image_that_declares_billions_of_pixels(tmp_path: Path) -> None:
    path = write(tmp_path / "cat" / "a.png")
    content = bytearray(path.read_bytes())
    content[16:24] = (60_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.png"):
        load_dataset(f"imagefolder:{tmp_path}", "test")


def test_grey_palette_and_transparent_images_become_rgb(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    Image.new("L", (8, 8), 7).save(tmp_path / "cat" / "a.png")
    Image.new("RGBA", (8, 8), (1, 2, 3, 0)).save(tmp_path / "cat" / "b.png")
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([9, 8, 7])
    palette.save(tmp_path / "cat" / "c.png", transparency=b"\0")
    images = load_dataset(f"imagefolder:{tmp_path}", "test").images([0, 1, 2])
    assert images[:, :, 0, 0].tolist() == [[7, 7, 7], [1, 2, 3], [9, 8, 7]]


def test_sixteen_bit_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "cat" / "a.png")
    with pytest.raises(InputError, match=r"a\.png is of mode I;16; expected 8 bits"):
        load_dataset(f"imagefolder:{tmp_path}", "test")


def test_sha256_follows_names_sizes_and_labels(tmp_path: Path) -> None:
    spec = f"imagefolder:{flat(tmp_path)}"
    digests = [
        load_dataset(spec, "test").sha256,
        load_dataset(spec, "test").sha256,
        load_dataset(spec, "test", 8).sha256,
    ]
    (tmp_path / "cat" / "a.png").rename(tmp_path / "cat" / "z.png")
    digests.append(load_dataset(spec, "test").sha256)
    (tmp_path / "cat" / "z.png").rename(tmp_path / "dog" / "z.png")
    digests.append(load_dataset(spec, "test").sha256)
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


def test_without_pillow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MissingDependency, match=r'PIL\.Image is not installed; run: pip install "edgeguard\[train\]"'):
        load_dataset(f"imagefolder:{tmp_path}", "test")


SIZES = ((160, 120), (120, 160), (200, 128), (96, 96), (128, 128))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 small photographs of noise: five sizes, JPEG and PNG, RGB and grey, in 10 classes, two thirds to train."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(300):
        width, height = SIZES[number % len(SIZES)]
        image = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8)).resize((width, height))
        folder = root / ("train" if number % 3 else "val") / f"class{number % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        image.convert("L" if number % 11 == 0 else "RGB").save(
            folder / f"{number:03}.{'png' if number % 4 == 0 else 'JPEG'}"
        )
    return root


def test_a_few_hundred_photographs(photos: Path) -> None:
    train, test = load_splits(f"imagefolder:{photos}", 128)
    assert (len(train), len(test), train.num_classes) == (200, 100, 10)
    assert train.image_shape == (3, 128, 128)
    seen = []
    order = np.random.default_rng(1).permutation(len(train))

    def make(number: int, indices: np.ndarray[tuple[int], np.dtype[np.int64]]) -> tuple[int, np.uint8]:
        images = train.augmented(indices, np.random.default_rng([1, number]), True)
        assert images.shape == (len(indices), 3, 128, 128)
        assert images.flags.c_contiguous
        return len(indices), images.max()

    for count, brightest in batches(order, 32, make):
        seen.append(count)
        assert brightest > 200
    assert seen == [32] * 6 + [8]
    assert test.images(np.arange(100)).std() > 20


@pytest.mark.parametrize("threads", [2, 7])
def test_threads_change_no_byte(photos: Path, threads: int) -> None:
    spec, chosen = f"imagefolder:{photos}", np.arange(0, 200, 5)
    one, many = (load_dataset(spec, "train", 128, count) for count in (1, threads))
    assert one.sha256 == many.sha256
    assert np.array_equal(one.images(chosen), many.images(chosen))
    first, second = (data.augmented(chosen, np.random.default_rng(5), True) for data in (one, many))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, one.augmented(chosen, np.random.default_rng(6), True))


def test_so_many_threads_decode(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: set[int] = set()
    meeting = threading.Barrier(3)
    real = folder_module.read_centre

    def noted(path: Path, image_size: int) -> Any:
        if threading.get_ident() not in used:
            used.add(threading.get_ident())
            meeting.wait(60)
        return real(path, image_size)

    monkeypatch.setattr(folder_module, "read_centre", noted)
    load_splits(f"imagefolder:{photos}", 128, threads=3)[1].images(np.arange(40))
    assert len(used) == 3
    meeting = threading.Barrier(1)
    used.clear()
    load_dataset(f"imagefolder:{photos}", "test", 128, threads=1).images(np.arange(40))
    assert len(used) == 1


def test_impossible_numbers_of_threads(photos: Path) -> None:
    for threads in (0, -1, 257):
        with pytest.raises(InputError, match=f"between 1 and 256, got {threads}"):
            load_dataset(f"imagefolder:{photos}", "train", 128, threads)


def test_only_photographs_have_crops_of_their_own(photos: Path, tmp_path: Path) -> None:
    assert load_dataset(f"imagefolder:{photos}", "train", 128).crop is not None
    small = load_dataset(f"imagefolder:{photos}", "train", 127)
    assert small.crop is None
    with pytest.raises(InputError, match="train has no training crops of its own"):
        small.augmented([0], np.random.default_rng(0), True)
    write(tmp_path / "cat" / "a.png", size=(128, 128))
    assert load_dataset(f"imagefolder:{tmp_path}", "train").crop is None


def test_parts_of_a_folder_keep_their_crops(photos: Path) -> None:
    data = load_dataset(f"imagefolder:{photos}", "train", 128)
    chosen = np.array([150, 3, 77])
    wanted = data.augmented(chosen, np.random.default_rng(0), True)
    part = data.subset(chosen)
    assert np.array_equal(part.augmented(np.arange(3), np.random.default_rng(0), True), wanted)
    rest, held = holdout(data, 0.2, seed=0)
    assert rest.augmented([0], np.random.default_rng(0), False).shape == (1, 3, 128, 128)
    assert held.augmented([], np.random.default_rng(0), False).shape == (0, 3, 128, 128)
    with pytest.raises(InputError, match="train has 3 images; the indices 3 to 3"):
        part.augmented([3], np.random.default_rng(0), False)
    draws = np.random.default_rng(0).random((3, data.crop_draws))
    assert np.array_equal(part.cropped([1, 2], draws[1:], True), wanted[1:])
    with pytest.raises(InputError, match=r"train takes 23 draws for each of 2 images, got \(3, 23\)"):
        part.cropped([1, 2], draws, True)


def test_a_damaged_photograph_is_named_when_it_is_cropped(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    whole = next((photos / "train").rglob("*.JPEG")).read_bytes()
    (tmp_path / "cat" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cat" / "good.jpg").write_bytes(whole)
    data = load_dataset(f"imagefolder:{tmp_path}", "train", 128)  # looks into no file
    assert data.augmented([1, 1], np.random.default_rng(0), True).shape == (2, 3, 128, 128)
    with pytest.raises(InputError, match=r"cut\.jpg cannot be read as an image"):
        data.augmented([1, 0, 1], np.random.default_rng(0), True)


def test_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    flat(tmp_path)
    write(tmp_path / "cat" / ".a.png")
    write(tmp_path / "cat" / ".thumbnails" / "a.png")
    write(tmp_path / ".cache" / "a.png")
    assert load_dataset(f"imagefolder:{tmp_path}", "test").labels.tolist() == [0, 0, 1]


def test_what_only_looks_like_a_file_is_named(tmp_path: Path) -> None:
    flat(tmp_path)
    (tmp_path / "dog" / "link.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(InputError, match=r"link\.png cannot be read: No such file"):
        load_dataset(f"imagefolder:{tmp_path}", "test")
    (tmp_path / "dog" / "link.png").unlink()
    os.mkfifo(tmp_path / "dog" / "pipe.png")
    with pytest.raises(InputError, match=r"pipe\.png is named like an image but is no file"):
        load_dataset(f"imagefolder:{tmp_path}", "test")


def test_links_to_images_are_images(tmp_path: Path) -> None:
    flat(tmp_path / "set")
    (tmp_path / "set" / "dog" / "link.png").symlink_to(tmp_path / "set" / "cat" / "a.png")
    data = load_dataset(f"imagefolder:{tmp_path}/set", "test")
    assert data.images([3])[0, :, 0, 0].tolist() == [4, 5, 6]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path) -> None:
    flat(tmp_path)
    (tmp_path / "dog" / "deep").chmod(0)
    try:
        with pytest.raises(InputError, match="deep cannot be listed"):
            load_dataset(f"imagefolder:{tmp_path}", "test")
    finally:
        (tmp_path / "dog" / "deep").chmod(0o755)


def test_sha256_follows_the_file_size_but_not_its_content(tmp_path: Path) -> None:
    spec = f"imagefolder:{flat(tmp_path)}"
    path = tmp_path / "cat" / "a.png"
    before, content = load_dataset(spec, "test", 8).sha256, path.read_bytes()
    path.write_bytes(content[:-1] + b"x")
    assert load_dataset(spec, "test", 8).sha256 == before
    path.write_bytes(content + b"x")
    assert load_dataset(spec, "test", 8).sha256 != before
