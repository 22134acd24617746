from __future__ import annotations

import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from edgeguard.data import has_splits, load_dataset, load_splits
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
    monkeypatch.setattr("edgeguard.data.folder.MAX_PIXELS", 100)
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
