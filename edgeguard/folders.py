"""Folders that appear whole or not at all, folders that one process keeps to itself, and folders for a moment."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgeguard import locks
from edgeguard.errors import EdgeGuardError, InputError

PART = ".part"
"""Ends the name of a folder that is being filled."""
UNNAMED = re.compile(r"\..+\.[0-9]+\.[0-9a-f]{8}\.tmp")
"""A file that `files.write_bytes` is writing."""


def make_folder(path: Path) -> None:
    """Make a folder where there is none. Raises InputError where it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise InputError(f"cannot make the folder {path}: {exc.strerror or exc}") from exc


def new_folder(path: Path) -> Path:
    """Refuse an output folder that exists already: nothing is ever overwritten."""
    if path.exists() or path.is_symlink():
        raise InputError(f"{path} exists already; name a new folder with --out")
    return path


@contextmanager
def folder_transaction(path: Path) -> Iterator[Path]:
    """Fill a temporary folder beside `path`; it becomes `path` only if the block succeeds.

    What a process that was killed left of such a folder is removed.

    Raises:
        InputError: `path` exists, another process is filling it, or it cannot be written.
    """
    new_folder(path)
    temporary, lock = _claim(path)
    try:
        yield temporary
        _name_folder(temporary, path)
    except EdgeGuardError as exc:
        exc.args = (str(exc).replace(str(temporary), str(path)),)  # a file is known by where it would have been
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        locks.release(lock)


def _name_folder(temporary: Path, path: Path) -> None:
    new_folder(path)
    try:
        temporary.chmod(0o755)
        locks.sync(temporary)
        temporary.rename(path)
        locks.sync(path.parent)
    except OSError as exc:
        new_folder(path)  # another process was quicker
        raise InputError(f"cannot write {path}: {exc.strerror or exc}") from exc


def _claim(path: Path) -> tuple[Path, int | None]:
    """A temporary folder for `path` that no other process has, and its lock."""
    mine = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}\{PART}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for other in [entry for entry in path.parent.iterdir() if mine.fullmatch(entry.name) and entry.is_dir()]:
            with contextlib.suppress(FileNotFoundError):
                lock = locks.take(other)
                if lock is not None:  # its process is gone
                    shutil.rmtree(other, ignore_errors=True)
                    locks.release(lock)
        while True:
            temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=PART, dir=path.parent))
            with contextlib.suppress(BlockingIOError, FileNotFoundError):  # another one cleared it away in this moment
                return temporary, locks.take(temporary)
    except BlockingIOError as exc:
        raise InputError(f"another process is writing {path}; wait for it, or name another folder with --out") from exc
    except OSError as exc:
        raise InputError(f"cannot write to {path.parent}: {exc.strerror or exc}") from exc


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder where the system keeps temporary files, for the time of the block.

    Raises:
        InputError: there is none that can be written, or the block filled it.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="edgeguard-") as folder:
            yield Path(folder)
    except OSError as exc:
        place = exc.filename or tempfile.tempdir or "a temporary folder"
        raise InputError(f"cannot write {place}: {exc.strerror or exc}; TMPDIR names another place") from exc


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep a folder, which is made where it is missing, to this process; a process that ends, however, gives it back.

    What a process that was killed left half-written in it is removed. Where the system has no such locks nothing is held.

    Raises:
        InputError: another process holds the folder, or it cannot be made.
    """
    try:
        lock = locks.take_made(folder)
    except BlockingIOError as exc:
        raise InputError(f"another process is writing {folder}; wait until it has ended") from exc
    except OSError as exc:
        raise InputError(f"cannot write to {folder}: {exc.strerror or exc}") from exc
    try:
        if lock is not None:
            for left in [entry for entry in folder.rglob(".*.tmp") if UNNAMED.fullmatch(entry.name)]:
                with contextlib.suppress(OSError):
                    left.unlink()
        yield
    finally:
        locks.release(lock)
