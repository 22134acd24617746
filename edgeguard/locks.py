"""Locks on folders and files that end with the process which holds them, however it ends; names that survive a loss of power.

A lock is advice between processes of this program, also of two containers on one machine. Windows and some network drives have
none; there nothing is held.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from pathlib import Path

if sys.platform != "win32":
    import fcntl


def take(path: Path) -> int | None:
    """Lock a folder or a file. Returns a handle for `release`, or None where there are no such locks.

    Raises:
        BlockingIOError: another process holds it. FileNotFoundError: it is gone, or another of its name took its place.
    """
    if sys.platform == "win32":
        return None
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(handle), os.stat(path)):
            raise FileNotFoundError(path)
    except (BlockingIOError, FileNotFoundError):
        os.close(handle)
        raise
    except OSError:
        os.close(handle)
        return None
    return handle


def take_made(folder: Path) -> int | None:
    """As `take`, of a folder that is made where it is missing.

    Raises:
        BlockingIOError: another process holds it. OSError: it cannot be made.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # its holder removed it in this moment
            return take(folder)


def clear(folder: Path, names: re.Pattern[str]) -> None:
    """Remove the files of such names that no process holds: the processes that began them were killed."""
    for left in [entry for entry in folder.iterdir() if names.fullmatch(entry.name) and entry.is_file()]:
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            lock = take(left)
            try:
                if lock is not None:
                    left.unlink()
            finally:
                release(lock)


def release(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)


def sync(folder: Path) -> None:
    """Make what was renamed in a folder last through a loss of power, where the system can."""
    if sys.platform == "win32":
        return
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
