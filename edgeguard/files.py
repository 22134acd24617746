"""Writing files so that a crash never leaves half of one, and hashing them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import struct
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeguard.errors import InputError


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file under a temporary name in the same folder, then rename it.

    Raises:
        InputError: when the disk is full or the folder cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    except OSError as exc:
        temporary.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {exc.strerror or exc}") from exc


def write_json(path: Path, document: object) -> None:
    """Write a JSON document, atomically, with a fixed layout so that equal documents give equal bytes."""
    write_bytes(path, to_json(document).encode())


def to_json(document: object) -> str:
    """The one JSON layout of this project. NaN and infinity are refused: they are not JSON."""
    return json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def read_json(path: Path, limit: int = 64 << 20) -> Any:
    """Read a JSON file of at most `limit` bytes.

    Raises:
        InputError: missing, too large, not UTF-8 or not JSON.
    """
    try:
        size = path.stat().st_size
        if size > limit:
            raise InputError(f"{path} has {size} bytes; at most {limit} were expected")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise InputError(f"{path} does not exist") from exc
    except OSError as exc:
        raise InputError(f"cannot read {path}: {exc.strerror or exc}") from exc
    except (ValueError, RecursionError) as exc:
        raise InputError(f"{path} is not valid JSON: {exc}") from exc


def read_npz(path: Path, limit: int, names: Collection[str] | None = None) -> dict[str, NDArray[Any]]:
    """Read the arrays of an npz file. Nothing is unpickled, and all sizes are checked before anything is allocated.

    Args:
        limit: the most bytes that the arrays may take together.
        names: read only these, as far as they are there; without it every array.

    Raises:
        InputError: missing, truncated, too large, pickled, or not an npz file at all.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            every = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
            chosen = {name: member for name, member in every.items() if names is None or name in names}
            members = chosen.values()
            if sum(member.file_size for member in members) > limit:
                raise InputError(f"{path}: unpacks to more than {limit} bytes")
            for member in members:
                _check_member(archive, member, path)
            return {name: _read_member(archive, member) for name, member in chosen.items()}
    except FileNotFoundError as exc:
        raise InputError(f"{path} does not exist") from exc
    except (
        OSError, ValueError, TypeError, KeyError, EOFError, SyntaxError, MemoryError, RuntimeError, OverflowError,
        zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError,
    ) as exc:  # fmt: skip
        raise InputError(f"{path} is not a readable npz file: {exc}") from exc


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
        if math.prod(shape) * dtype.itemsize != member.file_size - handle.tell():
            raise InputError(f"{path}: {member.filename!r} declares {shape} {dtype}, which is not what it holds")


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    with archive.open(member) as handle:
        array: NDArray[Any] = np.lib.format.read_array(handle, allow_pickle=False)
    return array


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def new_folder(path: Path) -> Path:
    """Refuse an output folder that exists already: nothing is ever overwritten."""
    if path.exists() or path.is_symlink():
        raise InputError(f"{path} exists already; name a new folder with --out")
    return path


@contextmanager
def folder_transaction(path: Path) -> Iterator[Path]:
    """Fill a temporary folder beside `path`; it becomes `path` only if the block succeeds."""
    new_folder(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as exc:
        raise InputError(f"cannot write to {path.parent}: {exc.strerror or exc}") from exc
    try:
        yield temporary
        temporary.chmod(0o755)
        new_folder(path)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
