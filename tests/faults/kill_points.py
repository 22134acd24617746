"""SIGKILL at named points of a job's life, and what is there afterwards."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass

from jobs import EXPORT, HARDEN, JOBS, VERIFY, Job, Workshop, contents, leftovers, read_all

WORDS = {
    "name": "{name} is written and has not got its name", "named": "{name} has its name",
    "make": "before the folder {name} is made", "remove": "before {name} is removed", "step": "after the optimizer's step",
    "ask": "before the engine is called",
}  # fmt: skip
THOROUGH = (HARDEN, EXPORT, VERIFY)
LAST = 3
"""Points that are tried of the other jobs, around their last file."""


@dataclass(frozen=True)
class Point:
    """Where a job is killed. at: the operation. half: after cutting the file that is being written."""

    job: Job
    at: str
    half: bool = False

    @property
    def words(self) -> str:
        """The point in words, as tables show it."""
        if self.at == "end":
            return f"{self.job.name}: at the end"
        name, number = self.at.rsplit(" ", 1)
        kind, _, what = name.partition(" ")
        text = f"half of {what} is in its temporary file" if self.half else WORDS[kind].format(name=what)
        return f"{self.job.name}: {text}, time {number}"


@dataclass(frozen=True)
class Outcome:
    """readable: files that could be read at once; refused: sentences about the others; said: what the user saw afterwards."""

    readable: int
    refused: tuple[str, ...]
    said: str


def points(job: Job, operations: tuple[str, ...]) -> Iterator[Point]:
    """Of each kind of operation the last of a job, files half written, and steps and calls of the engine spread over it."""
    last: dict[str, str] = {}
    for operation in operations:
        last[operation.rsplit(" ", 1)[0]] = operation
    if job not in THOROUGH:
        files = [name for name in last if name.startswith(("write ", "name ", "named "))]
        last = {name: last[name] for name in sorted(files, key=lambda name: operations.index(last[name]))[-LAST:]}
    for name, at in last.items():
        if name in ("step", "ask"):
            number = int(at.rsplit(" ", 1)[1])
            yield from (Point(job, f"{name} {chosen}") for chosen in sorted({1, max(1, number // 2), number}))
            continue
        yield Point(job, at, half=name.startswith("write "))


def kill(workshop: Workshop, point: Point) -> Outcome:
    """Kill a job at a point, look at what is there, and do again what a user would do.

    Raises:
        AssertionError: anything is corrupt, lost, left over, or other than in an undisturbed run.
    """
    job = point.job
    folder = workshop.bench(job)
    before = contents(folder)
    ended = workshop.nursery.run(folder, *job.command, fault={"at": point.at, "act": "half" if point.half else "kill"})
    assert ended.code == -signal.SIGKILL, (point, ended)
    assert "Traceback" not in ended.stderr
    readable, refused = read_all(folder)
    assert all("\n" not in sentence for sentence in refused)
    assert {name: digest for name, digest in contents(folder).items() if name in before and not name.startswith(job.out)} == {
        name: digest for name, digest in before.items() if not name.startswith(job.out)
    }
    finished = job.out if job.again is None and (folder / job.out).exists() else None
    again = workshop.end_as_whole(job, folder)
    if finished and (folder / job.out).is_dir():  # the same command does not write over a result
        refusal = workshop.nursery.run(folder, *job.command)
        assert refusal.code == 2, refusal
        said = refusal.sentence
        assert "exists already" in said
    else:
        said = again.stderr.strip().splitlines()[0] if again is not None and again.stderr.strip() else ""
    if not finished:
        assert not leftovers(folder), leftovers(folder)
    shutil.rmtree(folder)
    return Outcome(readable, tuple(refused), said)


def every_point(workshop: Workshop) -> Iterator[Point]:
    """All points that are tried, over all jobs."""
    for job in JOBS:
        yield from points(job, workshop.whole(job)[1].operations)
