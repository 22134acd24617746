"""Writing files so that a crash never leaves half of one, and hashing them."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import re
import struct
import sys
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeguard import locks
from edgeguard.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEEPEST = 64
"""Objects and lists of a JSON file within each other."""
MOST_VALUES = 1 << 21
"""Of a JSON file: each is an object in memory, up to fifty times as large as its text."""
MODEST, INFLATION = 256 << 20, 50
"""What an archive unpacks to is taken as it is up to so many bytes, and beyond while the file has a fiftieth of it."""
MOST_DOTS = 2000
MAX_DIRECTORY = 4 << 20
"""Bytes of an archive's table of contents."""
END_OF_ARCHIVE, END_OF_LARGE_ARCHIVE = b"PK\5\6", b"PK\6\7"


def write_bytes(path: Path, data: bytes, *, new: bool = False) -> None:
    """Write a file under a temporary name in the same folder, then rename it.

    new: never in place of a file that is there, not even of one that another process wrote meanwhile; what a process that was
    killed left half-written of it is removed.

    Raises:
        InputError: when the disk is full or the folder cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    lock = None
    try:
        if new:
            locks.clear(path.parent, re.compile(rf"\.{re.escape(path.name)}\.[0-9]+\.[0-9a-f]{{8}}\.tmp"))
        with temporary.open("xb") as handle:
            lock = locks.take(temporary) if new else None
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        if new:
            _name_new(temporary, path)
        else:
            temporary.replace(path)
        locks.sync(path.parent)
    except FileExistsError as exc:
        raise InputError(f"{path} exists already; another process wrote it meanwhile") from exc
    except OSError as exc:
        raise InputError(f"cannot write {path}: {exc.strerror or exc}") from exc
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        locks.release(lock)


def _name_new(temporary: Path, path: Path) -> None:
    """Give a file its name, unless there is one of that name: FileExistsError."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError as exc:  # a file system that knows one name a file, where the moment between the two lines remains
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from exc
        temporary.replace(path)


def write_json(path: Path, document: object) -> None:
    """Write a JSON document, atomically, with a fixed layout so that equal documents give equal bytes."""
    write_bytes(path, to_json(document).encode())


def to_json(document: object) -> str:
    """The one JSON layout of this project. NaN and infinity are refused: they are not JSON."""
    return json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def write_npz(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write an archive that `numpy.load` reads, atomically, not compressed. ValueError refuses arrays of objects.

    Equal arrays give equal bytes on every version of Python; what `numpy.savez` writes differs between them.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            content, entry = io.BytesIO(), zipfile.ZipInfo(f"{name}.npy")
            np.lib.format.write_array(content, np.asanyarray(array), allow_pickle=False)
            entry.create_system = 3  # as on Unix, wherever it is written
            archive.writestr(entry, content.getvalue())
    write_bytes(path, buffer.getvalue())


def read_json(path: Path, limit: int = 64 << 20) -> Any:
    """Read a JSON file of at most `limit` bytes.

    Raises:
        InputError: missing, too large, not UTF-8, or as `parse_json`.
    """
    data = read_bytes(path, limit)
    try:
        return parse_json(data)
    except InputError as exc:
        raise InputError(f"{path} is not valid JSON: {exc}") from exc


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a plain file of at most `limit` bytes.

    Raises:
        InputError: missing, no plain file (a pipe or a device would never end), or too large.
    """
    try:
        if not path.exists():
            raise InputError(f"{path} does not exist")
        if not path.is_file():
            raise InputError(f"cannot read {path}: it is not a plain file")
        with path.open("rb") as handle:
            data = handle.read(limit + 1)
    except OSError as exc:
        raise InputError(f"cannot read {path}: {exc.strerror or exc}") from exc
    if len(data) > limit:
        raise InputError(f"{path} has {path.stat().st_size} bytes; at most {limit} were expected")
    return data


def parse_json(data: bytes) -> Any:
    """A JSON document of UTF-8 text. Its values are counted before they are built.

    Raises:
        InputError: not JSON, too many values, nested too deep, or holding what no file of this project can hold: NaN,
            infinity, a number beyond float64, or half of a surrogate pair.
    """
    if data.count(b",") + data.count(b"[") + data.count(b"{") > MOST_VALUES:
        raise InputError(f"it holds more than {MOST_VALUES} values")
    try:
        document = json.loads(data.decode())
    except (ValueError, RecursionError, MemoryError) as exc:
        raise InputError(f"{exc!s:.200}") from exc
    todo = [(document, 0)]
    while todo:
        value, depth = todo.pop()
        if depth > DEEPEST:
            raise InputError(f"it is nested deeper than {DEEPEST} levels")
        if isinstance(value, dict):
            todo += [(part, depth + 1) for part in (*value.keys(), *value.values())]
        elif isinstance(value, list):
            todo += [(part, depth + 1) for part in value]
        elif isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"it holds {value}, which is no number")
        elif isinstance(value, str) and not value.isascii() and any("\ud800" <= sign <= "\udfff" for sign in value):
            raise InputError("it holds text that is not valid Unicode: half of a surrogate pair")
    return document


def read_toml(path: Path, limit: int) -> dict[str, Any]:
    """Read a TOML file of at most `limit` bytes. A key of many dots takes its reader time by their square, so they are counted.

    Raises:
        InputError: as `read_bytes`; not TOML, nested too deep, or more than `MOST_DOTS` dots.
    """
    data = read_bytes(path, limit)
    if data.count(b".") > MOST_DOTS:
        raise InputError(f"{path} is not valid TOML for this: it holds more than {MOST_DOTS} dots")
    try:
        values: dict[str, Any] = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as exc:  # TOML's own error is a ValueError; so is a number of 5,000 digits
        raise InputError(f"{path} is not valid TOML: {exc!s:.200}") from exc
    return values


def expanded(text: str) -> Path:
    """A path as somebody wrote it, `~` and `~name` replaced.

    Raises:
        InputError: there is no such user.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as exc:
        raise InputError(f"{text!r:.200}: {exc}") from exc


def has_plain_file(folder: Path, name: str) -> bool:
    """Whether a name that somebody wrote is that of a plain file in a folder itself: no path, no link, no device."""
    try:
        return Path(name).name == name and (folder / name).is_file() and not (folder / name).is_symlink()
    except (OSError, ValueError):  # longer than a name may be, or with a zero byte
        return False


def read_npz(path: Path, limit: int, names: Collection[str] | None = None) -> dict[str, NDArray[Any]]:
    """Read the arrays of an npz file. Nothing is unpickled, and all sizes are checked before anything is allocated.

    Args:
        limit: the most bytes that the arrays may take together.
        names: read only these, as far as they are there; without it every array.

    Raises:
        InputError: missing, truncated, too large, pickled, or not an npz file at all.
    """
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path} is not a readable npz file: it is not a plain file")
        check_directory(path)
        with zipfile.ZipFile(path) as archive, warnings.catch_warnings():
            warnings.simplefilter("error")  # NumPy warns of headers that are half valid
            every = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
            chosen = {name: member for name, member in every.items() if names is None or name in names}
            members = chosen.values()
            size = sum(member.file_size for member in members)
            if size > limit:
                raise InputError(f"{path}: unpacks to more than {limit} bytes")
            check_inflation(path, size)
            for member in members:
                _check_member(archive, member, path)
            return {name: _read_member(archive, member) for name, member in chosen.items()}
    except FileNotFoundError as exc:
        raise InputError(f"{path} does not exist") from exc
    except (
        OSError, ValueError, TypeError, KeyError, EOFError, SyntaxError, MemoryError, RuntimeError, OverflowError,
        zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError, Warning,
    ) as exc:  # fmt: skip
        raise InputError(f"{path} is not a readable npz file: {' '.join(str(exc).split()):.300}") from exc


def check_directory(path: Path) -> None:
    """Bound the table of contents of a zip archive, which the reader turns into objects before anything can be counted.

    Raises:
        InputError: it is too large. OSError: the file cannot be read.
    """
    with path.open("rb") as handle:
        handle.seek(0, io.SEEK_END)
        handle.seek(max(0, handle.tell() - (1 << 16) - 98))
        tail = handle.read()
    start = tail.rfind(END_OF_ARCHIVE)
    size = int.from_bytes(tail[start + 12 : start + 16], "little") if start >= 0 else 0
    if start >= 76 and tail[start - 20 : start - 16] == END_OF_LARGE_ARCHIVE:  # zip64, whose record is before that
        size = int.from_bytes(tail[start - 36 : start - 28], "little")
    if size > MAX_DIRECTORY:
        raise InputError(f"{path}: the archive's table of contents has more than {MAX_DIRECTORY} bytes")


def check_inflation(path: Path, size: int) -> None:
    """Raises InputError when an archive would unpack to `size` bytes, which is far more than any data of its own size."""
    stored = path.stat().st_size
    if size > MODEST and size > INFLATION * stored:
        raise InputError(f"{path}: its {stored} bytes unpack to {size}; no data is compressed so well, a bomb is")


def _check_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> None:
    """Hold the array that a member's header declares against the bytes that the member has."""
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise InputError(f"{path}: {member.filename!r} is compressed in an unexpected way")
    with archive.open(member) as handle:
        version = np.lib.format.read_magic(handle)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise InputError(f"{path}: {member.filename!r} is of npy version {version}; expected 1.0 or 2.0")
        shape, _, dtype = readers[version](handle)
        if dtype.hasobject:
            raise InputError(f"{path}: {member.filename!r} holds pickled objects; only plain arrays are read")
        if not dtype.itemsize:
            raise InputError(f"{path}: {member.filename!r} declares {shape} values of no size")
        if math.prod(shape) * dtype.itemsize != member.file_size - handle.tell():
            raise InputError(f"{path}: {member.filename!r} declares {shape} {dtype}, which is not what it holds")


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    with archive.open(member) as handle:
        array: NDArray[Any] = np.lib.format.read_array(handle, allow_pickle=False)
    return array


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file.

    Raises:
        InputError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
    except OSError as exc:
        raise InputError(f"cannot read {path}: {exc.strerror or exc}") from exc
    return digest.hexdigest()
