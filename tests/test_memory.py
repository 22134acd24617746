"""Freed memory: what glibc does with it, in processes of their own, for the setting cannot be taken back."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource, sys
from edgeguard.memory import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
took = keep_freed_memory() if sys.argv[1] == "keep" else False
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    block = libc.malloc(64 << 20)
    ctypes.memset(block, 1, 64 << 20)
    libc.free(block)
print(took, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> tuple[bool, int]:
    """What the function returned, and how often the kernel had to map a page while 64 MB were taken and freed 20 times."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True)
    took, count = done.stdout.split()
    return took == "True", int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_kept_for_the_next_pass() -> None:
    _, without = faults("leave")
    took, kept = faults("keep")
    assert took
    pages = (64 << 20) // resource.getpagesize()
    assert kept < 0.5 * without
    assert kept < 4 * pages


def test_elsewhere_than_with_glibc_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeguard.memory import keep_freed_memory, return_freed_memory

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr("ctypes.CDLL", None)  # it would fail if it were called
    assert keep_freed_memory() is False
    assert return_freed_memory() is False
