"""How the C library hands memory to a process, and takes it back."""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Options of glibc's `mallopt`."""
KEPT_BYTES = (1 << 31) - 1
LARGEST_BLOCK = 1 << 30


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, for its next pass.

    By default glibc gives large blocks back to the kernel at once, and every pass over a batch then waits until they are
    mapped anew: a third of the time of a training step of a small net. It holds for the whole process, so only commands
    call it. Source: mallopt(3).

    Returns: whether it took effect; elsewhere than on Linux with glibc nothing changes.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK)) and bool(mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))


def return_freed_memory() -> bool:
    """Give back to the system what every thread has freed. glibc keeps it otherwise, for each thread its own.

    Returns: whether it could be asked for; elsewhere than on Linux with glibc nothing changes. Source: malloc_trim(3).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    ctypes.CDLL(None).malloc_trim(0)
    return True
