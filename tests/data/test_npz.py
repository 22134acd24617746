from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeguard.data import load_dataset
from edgeguard.data.npz import load_npz
from edgeguard.errors import InputError

IMAGES = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
LABELS = np.array([1, 0])


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **{"images": IMAGES, "labels": LABELS, **arrays})
    return path


def npy(header: bytes, body: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    header = header.ljust(118 - 1) + b"\n"
    return b"\x93NUMPY" + version + len(header).to_bytes(2, "little") + header + body


def pack(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


def labels_npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, LABELS)
    return buffer.getvalue()


def test_round_trip(tmp_path: Path) -> None:
    dataset = load_dataset(f"npz:{save(tmp_path / 'a.npz')}", "train")
    np.testing.assert_array_equal(dataset.images([0, 1]), IMAGES.transpose(0, 3, 1, 2))
    assert dataset.labels.tolist() == [1, 0]
    assert dataset.name == "a"
    assert dataset.class_names == ("0", "1")


def test_class_names_are_kept(tmp_path: Path) -> None:
    dataset = load_npz(save(tmp_path / "a.npz", class_names=np.array(["cat", "dog", "owl"])))
    assert dataset.class_names == ("cat", "dog", "owl")
    assert dataset.num_classes == 3


def test_the_split_is_put_into_the_name(tmp_path: Path) -> None:
    save(tmp_path / "x-train.npz")
    save(tmp_path / "x-test.npz", labels=np.array([0, 1]))
    spec = f"npz:{tmp_path}/x-{{split}}.npz"
    assert load_dataset(spec, "train").labels.tolist() == [1, 0]
    assert load_dataset(spec, "test").labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": IMAGES.astype(np.int32)}, "images must be .N, H, W, 3. uint8, got .* int32"),
        ({"images": IMAGES.transpose(0, 3, 1, 2)}, "images must be .N, H, W, 3."),
        ({"labels": LABELS.astype(np.int32)}, "labels must be .N,. int64, got .* int32"),
        ({"labels": LABELS.astype(np.float64)}, "labels must be .N,. int64"),
        ({"labels": np.array([0, -3])}, "must not be negative, got -3"),
        ({"labels": np.array([0, 1, 2])}, "2 images but 3 labels"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "holds no images"),
        ({"class_names": np.array([1, 2])}, "class_names must be"),
        ({"class_names": np.array(["a"])}, "outside its 1 class names"),
        ({"labels": np.array([0, None], object)}, "holds pickled objects"),
    ],
)
def test_wrong_arrays(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    path = save(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=message):
        load_npz(path)


def test_missing_file_and_missing_array(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.npz does not exist"):
        load_npz(tmp_path / "none.npz")
    np.savez(tmp_path / "a.npz", images=IMAGES)
    with pytest.raises(InputError, match="no array 'labels'"):
        load_npz(tmp_path / "a.npz")
    with pytest.raises(InputError, match="not a readable npz file"):
        load_npz(tmp_path)


def test_truncated_and_damaged_files(tmp_path: Path) -> None:
    whole = save(tmp_path / "a.npz").read_bytes()
    pixel = whole.index(IMAGES.tobytes())
    damaged = [b"", b"hello", whole[: len(whole) // 2], whole[:pixel] + b"\xff" + whole[pixel + 1 :]]
    for content in damaged:
        (tmp_path / "b.npz").write_bytes(content)
        with pytest.raises(InputError, match=r"b\.npz is not a readable npz file"):
            load_npz(tmp_path / "b.npz")


def test_a_bomb_is_refused_by_its_size(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, images=np.zeros((1000, 32, 32, 3), np.uint8), labels=np.zeros(1000, np.int64))
    assert path.stat().st_size < 10_000
    with pytest.raises(InputError, match="unpacks to more than 1000000 bytes"):
        load_npz(path, limit=1_000_000)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (999999999999, 32, 32, 3)}"),
            "declares .999999999999, 32, 32, 3. uint8",
        ),
        (npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (1, 1, 1, 3)}", b"\0" * 50), "declares .1, 1, 1, 3. uint8"),
        (npy(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", b"cos\nsystem\n"), "holds pickled objects"),
        (npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (-2, -2)}", b"\0" * 4), "not a readable"),
        (npy(b"__import__('os')"), "not a readable"),
        (npy(b"", version=b"\x09\x00"), "npy version"),
        (b"no array", "not a readable"),
    ],
)
def test_lying_headers(tmp_path: Path, content: bytes, message: str) -> None:
    path = pack(tmp_path / "a.npz", images=content, labels=labels_npy())
    with pytest.raises(InputError, match=message):
        load_npz(path)


def test_image_size_cannot_resize_an_archive(tmp_path: Path) -> None:
    spec = f"npz:{save(tmp_path / 'a.npz')}"
    assert load_dataset(spec, "test", 4).image_shape == (3, 4, 4)
    with pytest.raises(InputError, match="4x4 pixels; only digits and image folders"):
        load_dataset(spec, "test", 8)


def test_a_label_does_not_make_as_many_class_names(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"65536 classes at most, got the label 1099511627776"):
        load_npz(save(tmp_path / "a.npz", labels=np.array([0, 2**40])))
