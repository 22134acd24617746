"""Two processes that write one place at the same time: one is stopped somewhere, the other runs, the first one goes on."""

from __future__ import annotations

import os
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from jobs import JOBS, PAGE, RESUME, Job, Workshop, leftovers

REFUSALS = ("exists already", "another process is writing")


@dataclass(frozen=True)
class Meeting:
    """Two times the same job. at: where the first one is stopped."""

    job: Job
    at: str


def meetings(workshop: Workshop) -> list[Meeting]:
    """Each job stopped before it has written anything, and in the middle."""
    found = []
    for job in JOBS:
        operations = workshop.whole(job)[1].operations
        last = max(number for number, one in enumerate(operations) if one.startswith(("name ", "named ")))
        places = (last,) if job is PAGE else (0, last // 2)
        found += [Meeting(job, operations[place]) for place in dict.fromkeys(places)]
    return found


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def meet(workshop: Workshop, meeting: Meeting) -> str:
    """Returns what the process was told that did not write.

    Raises:
        AssertionError: not exactly one wrote, the other got no sentence, or the result is another.
    """
    job, nursery = meeting.job, workshop.nursery
    folder = workshop.bench(job)
    first = nursery.start(folder, *job.command, fault={"at": meeting.at, "act": "stop"})
    deadline = time.monotonic() + 120
    while _state(first.pid) != "T":
        assert _state(first.pid) != "Z", nursery.wait(first)
        assert time.monotonic() < deadline
        time.sleep(0.02)
    ends = [nursery.run(folder, *job.command)]
    os.kill(first.pid, signal.SIGCONT)
    ends.append(nursery.wait(first))
    refused = [end for end in ends if end.code]
    if job is RESUME and not refused:  # the first one had not looked yet, and found that all was done
        said = "both end with the same run"
    else:
        assert [end.code for end in refused] == [2], (meeting, ends)
        said = refused[0].sentence
        assert any(reason in said for reason in REFUSALS), said
    workshop.same(job, folder)
    assert not leftovers(folder), leftovers(folder)
    shutil.rmtree(folder)
    return said
