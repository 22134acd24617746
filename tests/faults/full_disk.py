"""Jobs on a disk that is too small for them: a small tmpfs of our own, or, where none can be mounted, a limit on every file."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jobs import EXPORT, HARDEN, PAGE, RESUME, VERIFY, Job, Workshop, contents, leftovers, read_all
from jobs import JOBS as EVERY

MEBIBYTES, SMALLEST = 24, 4096
SHARES = (0.0, 0.4)
"""Room that a job is left, as a part of what its result takes."""
JOBS = tuple(job for job in EVERY if job is not PAGE)
PATH = re.compile(r"cannot (write|write to|make the folder) \S+: ")


@dataclass(frozen=True)
class Disk:
    """A folder; mounted: on a file system of its own, which can be filled."""

    folder: Path
    mounted: bool

    def leave(self, room: int) -> None:
        """Fill it but for so many bytes, in pages."""
        found = os.statvfs(self.folder)
        size = found.f_bavail * found.f_frsize - room
        with (self.folder / "filler").open("wb") as handle:
            handle.write(b"\0" * max(0, size))

    def free(self) -> None:
        (self.folder / "filler").unlink()

    @property
    def way(self) -> str:
        return f"a tmpfs of {MEBIBYTES} MiB" if self.mounted else "RLIMIT_FSIZE, as no tmpfs could be mounted here"


@contextmanager
def small_disk(folder: Path) -> Iterator[Disk]:
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={MEBIBYTES}m", "edgeguard-faults", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield Disk(folder, mounted)
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def fill(workshop: Workshop, disk: Disk, job: Job, share: float) -> str:
    """Run a job that finds too little room, then make room and run it again. Returns what the user saw.

    Raises:
        AssertionError: no sentence, or anything lost, corrupt, or other than in an undisturbed run.
    """
    workshop.whole(job)
    folder = workshop.bench(job, disk.folder / "benches")
    before = contents(folder)
    largest, total = workshop.sizes(job)
    if disk.mounted:
        disk.leave(int(share * total))
    limit = None if disk.mounted else max(SMALLEST, int(share * largest))  # so much that a sentence fits into a log
    failed = workshop.nursery.run(folder, *job.command, file_bytes=limit)
    if disk.mounted:
        disk.free()
    said = failed.sentence
    assert failed.code == 2, failed
    assert PATH.search(failed.stderr), failed.stderr
    assert "No space left on device" in failed.stderr or "File too large" in failed.stderr
    readable, refused = read_all(folder)
    assert readable >= len(before) - (job is RESUME)
    assert len(refused) <= 1
    assert not [name for name in leftovers(folder) if not name.endswith(".unfinished")], leftovers(folder)
    assert {name: digest for name, digest in contents(folder).items() if name in before and not name.startswith(job.out)} == {
        name: digest for name, digest in before.items() if not name.startswith(job.out)
    }
    workshop.end_as_whole(job, folder)
    assert not leftovers(folder)
    shutil.rmtree(folder)
    return said


def no_temporary_files(workshop: Workshop, disk: Disk) -> str:
    """An export whose folder for temporary files is full."""
    folder = workshop.bench(EXPORT)
    if not disk.mounted:
        return "not tried: no tmpfs could be mounted"
    disk.leave(4 * SMALLEST)  # Python looks elsewhere where not even a few bytes can be written
    failed = workshop.nursery.run(folder, *EXPORT.command, TMPDIR=str(disk.folder))
    disk.free()
    assert failed.code == 2, failed
    assert f"cannot write {disk.folder}/" in failed.sentence
    assert not (folder / EXPORT.out).exists()
    workshop.end_as_whole(EXPORT, folder)
    return failed.sentence


def full_streams(workshop: Workshop) -> str:
    """Results to a full disk's stdout are said to be lost, and are in the folder; a full stderr stops nothing."""
    folder = workshop.bench(EXPORT)
    failed = workshop.nursery.run(folder, *EXPORT.command, stdout="/dev/full")
    assert failed.code == 2, failed
    assert "cannot write the standard output: No space left on device" in failed.sentence
    workshop.end_as_whole(EXPORT, folder)
    for job in (HARDEN, VERIFY):
        folder = workshop.bench(job)
        quiet = workshop.nursery.run(folder, *job.command, stderr="/dev/full")
        assert quiet.code == 0, quiet
        assert quiet.stdout
        workshop.end_as_whole(job, folder)
    return failed.sentence
