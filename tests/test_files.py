from __future__ import annotations

import errno
import hashlib
import io
import os
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeguard import files, locks
from edgeguard.errors import InputError

LIMIT = 1 << 20


def test_write_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_bytes(path, b"one")
    files.write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    files.write_bytes(path, b"old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"cannot write .*file: No space left on device"):
        files.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_round_trip_and_refusals(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"ä": [1, 2.5, None]})
    assert files.read_json(path) == {"ä": [1, 2.5, None]}
    assert "ä" in path.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="JSON"):
        files.to_json({"nan": float("nan")})
    for content, message in (
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            files.read_json(path)
    with pytest.raises(InputError, match="at most 10 were expected"):
        files.read_json(path, limit=10)
    with pytest.raises(InputError, match="does not exist"):
        files.read_json(tmp_path / "missing.json")
    with pytest.raises(InputError, match="cannot read"):
        files.read_json(tmp_path)


def test_sha256(tmp_path: Path) -> None:
    data = bytes(range(256)) * 9000
    (tmp_path / "file").write_bytes(data)
    assert files.sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_a_new_file_is_never_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    files.write_bytes(path, b"one", new=True)
    for link in (os.link, refuse):  # a file system that knows one name a file
        monkeypatch.setattr(os, "link", link)
        with pytest.raises(InputError, match="file exists already; another process wrote it meanwhile"):
            files.write_bytes(path, b"two", new=True)
    files.write_bytes(tmp_path / "other", b"three", new=True)
    assert {one.name: one.read_bytes() for one in tmp_path.iterdir()} == {"file": b"one", "other": b"three"}


@pytest.mark.skipif(sys.platform == "win32", reason="there are no locks")
def test_what_is_left_of_a_new_file_is_removed_unless_it_is_being_written(tmp_path: Path) -> None:
    dead, living, others = (tmp_path / f".file.12.{number}2345678.tmp" for number in (1, 2, 3))
    others = others.with_name(".other.12.12345678.tmp")
    for path in (dead, living, others):
        path.write_bytes(b"half")
    lock = locks.take(living)
    files.write_bytes(tmp_path / "file", b"x", new=True)
    locks.release(lock)
    assert {path.name for path in tmp_path.iterdir()} == {living.name, others.name, "file"}


def refuse(*_: object) -> None:
    raise PermissionError(errno.EPERM, "Operation not permitted")


def test_writers_of_one_file_do_not_share_a_temporary_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    sync = os.fsync

    def look(handle: int) -> None:
        seen.extend(path.name for path in tmp_path.iterdir())
        sync(handle)

    monkeypatch.setattr(os, "fsync", look)
    for _ in range(2):
        files.write_bytes(tmp_path / "file", b"x")
    temporary = {name for name in seen if name != "file"}
    assert len(temporary) == 2


def npy(shape: str, dtype: str = "'|u1'", data: bytes = b"") -> bytes:
    """An npy member whose header says whatever it likes."""
    header = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


def archive(path: Path, compression: int = zipfile.ZIP_STORED, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as handle:
        for name, data in members.items():
            handle.writestr(f"{name}.npy", data)
    return path


def test_read_npz(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6, dtype=np.int16).reshape(2, 3), "b": np.array(1.5), "c": np.zeros((0, 4), np.uint8)}
    np.savez(tmp_path / "stored.npz", **arrays)
    np.savez_compressed(tmp_path / "deflated.npz", **arrays)
    for name in ("stored.npz", "deflated.npz"):
        got = files.read_npz(tmp_path / name, LIMIT)
        assert got.keys() == arrays.keys()
        for key, values in arrays.items():
            np.testing.assert_array_equal(got[key], values)
            assert got[key].dtype == values.dtype


class Bomb:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle was executed",))


def pickled() -> bytes:
    return npy("(1,)", "'|O'", pickle.dumps([Bomb()]))


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (npy("(1099511627776,)"), "declares"),
        (npy("(4294967296, 4294967296, 4294967296)"), "declares"),
        (npy("(-1,)"), "declares"),
        (npy("(4,)", data=b"12"), "declares"),
        (npy("(4,)", data=b"12345"), "declares"),
        (npy("'x'"), "not a readable npz"),
        (npy("(1,)", "'nonsense'"), "not a readable npz"),
        (npy("__import__('os').getcwd()"), "not a readable npz"),
        (b"\x93NUMPY\x09\x00" + bytes(20), "version"),
        (b"", "not a readable npz"),
        (b"GIF89a", "not a readable npz"),
        (pickled(), "pickled"),
    ],
    ids=["huge", "overflow", "negative", "short", "long", "no-shape", "no-dtype", "code", "version", "empty", "gif", "pickle"],
)
def test_hostile_members_are_refused_before_anything_is_allocated(tmp_path: Path, member: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        files.read_npz(archive(tmp_path / "hostile.npz", a=npy("(1,)", data=b"1"), b=member), LIMIT)


def test_hostile_archives_are_refused(tmp_path: Path) -> None:
    good = io.BytesIO()
    np.savez(good, a=np.arange(1000))
    path = tmp_path / "hostile.npz"
    for length in (0, 3, 100, len(good.getvalue()) - 5):
        path.write_bytes(good.getvalue()[:length])
        with pytest.raises(InputError, match="not a readable npz"):
            files.read_npz(path, LIMIT)
    flipped = bytearray(good.getvalue())
    flipped[2000] ^= 255
    path.write_bytes(flipped)
    with pytest.raises(InputError, match="not a readable npz"):
        files.read_npz(path, LIMIT)
    with pytest.raises(InputError, match="does not exist"):
        files.read_npz(tmp_path / "missing.npz", LIMIT)


def test_archives_that_unpack_to_too_much_are_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "bomb.npz", zipfile.ZIP_DEFLATED, a=npy(f"({LIMIT},)", data=bytes(LIMIT)))
    assert path.stat().st_size < LIMIT / 100
    with pytest.raises(InputError, match="unpacks to more than"):
        files.read_npz(path, LIMIT)


def test_spoilt_compression_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "spoilt.npz", zipfile.ZIP_DEFLATED, a=npy("(5000,)", data=os.urandom(5000)))
    data = bytearray(path.read_bytes())
    data[60:200] = bytes(140)
    path.write_bytes(data)
    with pytest.raises(InputError, match="not a readable npz"):
        files.read_npz(path, LIMIT)
    with pytest.raises(InputError, match="compressed in an unexpected way"):
        files.read_npz(archive(tmp_path / "lzma.npz", zipfile.ZIP_LZMA, a=npy("(1,)", data=b"1")), LIMIT)


def test_archives_are_the_same_bytes_on_every_python(tmp_path: Path) -> None:
    """The SHA-256 was the same with Python 3.10, 3.11, 3.12 and 3.13; of `numpy.savez` there are two."""
    arrays = {
        "a": np.arange(6, dtype=np.int32).reshape(2, 3), "0.weight": np.ones((1, 2), np.int8),
        "empty": np.zeros((0, 4), np.float32),
    }  # fmt: skip
    files.write_npz(tmp_path / "a.npz", arrays)
    assert files.sha256(tmp_path / "a.npz") == "7b14fb1ff6c2f2ad52685a75ad5e80a0b235ebf68d321fef32489bffe7953b7a"
    with np.load(tmp_path / "a.npz") as read:
        assert list(read) == list(arrays)
        assert all(np.array_equal(read[name], array) and read[name].dtype == array.dtype for name, array in arrays.items())
    with pytest.raises(ValueError, match="Object arrays"):
        files.write_npz(tmp_path / "b.npz", {"a": np.array([{}])})
    assert not (tmp_path / "b.npz").exists()
