"""Writing files so that a crash never leaves half of one, and hashing them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
