"""Jobs while the system's clock is set; the monotonic clock goes on, as it does then.

With libfaketime, which sets it for all code of a process, where that is installed, else in Python's `time` alone.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from commands import Nursery
from jobs import ATTACK, EXPORT, HARDEN, POOL, SIDE, VERIFY, Job, Workshop, contents

DAY, YEAR = 86400, 31557600
LIBRARIES = ("/usr/lib/*/faketime/libfaketimeMT.so.1", "/usr/lib*/faketime/libfaketimeMT.so.1")


def library() -> Path | None:
    """libfaketime, or None where it is not installed."""
    found = [path for pattern in LIBRARIES for path in Path("/").glob(pattern[1:])]
    return found[0] if found else None


class Clock:
    """The clock of a nursery. offset: file with the seconds that it is ahead; behind are negative."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder, self.offset = folder, folder / "offset"
        self.set(0)

    def set(self, seconds: int) -> None:
        self.offset.write_text(f"{seconds:+d}\n")

    def fault(self, at: str, seconds: int) -> dict[str, str]:
        """Sets the clock at an operation of a job."""
        other = self.folder / f"offset{seconds:+d}"
        other.write_text(f"{seconds:+d}\n")
        return {"at": at, "act": "clock", "from": str(other), "to": str(self.offset)}

    @property
    def environment(self) -> dict[str, str]:
        if library() is None:
            return {"EDGEGUARD_FAULTS_CLOCK": str(self.offset)}
        return {
            "LD_PRELOAD": str(library()), "FAKETIME_TIMESTAMP_FILE": str(self.offset), "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }  # fmt: skip

    @property
    def way(self) -> str:
        return "libfaketime" if library() is not None else "Python's time.time, as libfaketime is not installed here"


@contextmanager
def clocked(workshop: Workshop, folder: Path) -> Iterator[tuple[Clock, Nursery]]:
    clock = Clock(folder / "clock")
    with Nursery(folder / "logs", clock.environment) as nursery:
        yield clock, nursery


Scenario = Callable[[Workshop, Clock, Nursery], str]


def _seconds(folder: Path) -> list[float]:
    timing = json.loads((folder / "report.json").read_text())["timing"]
    return [timing["total"], *(timing["attacks"] if isinstance(timing["attacks"], list) else timing["attacks"].values())]


def _set_in_the_middle(job: Job, share: float, by: int) -> Scenario:
    def scenario(workshop: Workshop, clock: Clock, nursery: Nursery) -> str:
        operations = workshop.whole(job)[1].operations
        folder = workshop.bench(job)
        ended = nursery.run(folder, *job.command, fault=clock.fault(operations[int(share * len(operations))], by))
        assert ended.code == 0, ended.stderr
        assert contents(folder / job.out) == workshop.whole(job)[0]
        if job is VERIFY:
            assert min(_seconds(folder / job.out)) >= 0
        shutil.rmtree(folder)
        return "same bytes"

    return scenario


def _set_between(job: Job, share: float, by: int) -> Scenario:
    """Killed, and gone on with at another time."""
    def scenario(workshop: Workshop, clock: Clock, nursery: Nursery) -> str:
        operations = [one for one in workshop.whole(job)[1].operations if one.startswith("named")]
        folder = workshop.bench(job)
        killed = nursery.run(folder, *job.command, fault={"at": operations[int(share * len(operations))], "act": "kill"})
        assert killed.code == -9
        kept = {path.name: path.stat().st_ino for path in folder.rglob("*.npz")}
        clock.set(by)
        workshop.end_as_whole(job, folder, nursery)
        if job is VERIFY:
            assert min(_seconds(folder / job.out)) >= 0
        assert kept
        shutil.rmtree(folder)
        return "same bytes"

    return scenario


def _set_before(job: Job, by: int) -> Scenario:
    def scenario(workshop: Workshop, clock: Clock, nursery: Nursery) -> str:
        clock.set(by)
        folder = workshop.bench(job)
        workshop.end_as_whole(job, folder, nursery)
        shutil.rmtree(folder)
        return "same bytes"

    return scenario


def _server(workshop: Workshop, clock: Clock, nursery: Nursery) -> str:
    """Set while a server serves: it answers as before, its log and figures have no negative duration."""
    folder = workshop.bench(VERIFY)
    begun = nursery.start(folder, "serve", "artifact", "--port", 0)
    deadline = time.monotonic() + 60
    while not (url := begun.output()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    address = urlsplit(url)
    pixels = np.zeros((2, 3, SIDE, SIDE), np.uint8)
    tensor = {"name": "pixels", "datatype": "UINT8", "shape": list(pixels.shape), "data": pixels.ravel().tolist()}
    answers = []
    for offset in (0, -DAY, -40 * YEAR, YEAR):
        clock.set(offset)
        connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=30)
        connection.request("POST", f"{address.path}/infer", json.dumps({"inputs": [tensor]}))
        reply = connection.getresponse()
        answers.append((reply.status, json.loads(reply.read())["outputs"]))
        connection.request("GET", "/metrics")
        figures = connection.getresponse().read().decode()
        connection.close()
    os.kill(begun.pid, signal.SIGTERM)
    ended = nursery.wait(begun)
    assert ended.code == 0, ended.stderr
    assert all(answer == answers[0] for answer in answers)
    assert answers[0][0] == 200
    assert not [line for line in figures.splitlines() if not line.startswith("#") and float(line.rsplit(" ", 1)[1]) < 0]
    lines = [json.loads(line) for line in ended.stderr.splitlines()]
    durations = [line["seconds"] for line in lines if line["event"] == "request"]
    assert len(durations) == 2 * len(answers)
    assert min(durations) >= 0
    return f"{len(answers)} right answers, {len(durations)} durations, none negative"


SCENARIOS: dict[str, Scenario] = {
    "harden: set back by a day while it trains": _set_in_the_middle(HARDEN, 0.5, -DAY),
    "harden: killed, resumed 40 years earlier": _set_between(HARDEN, 0.6, -40 * YEAR),
    "export: in 1971": _set_before(EXPORT, -55 * YEAR),
    "export --pool: in 2110": _set_before(POOL, 84 * YEAR),
    "attack: in 1971": _set_before(ATTACK, -55 * YEAR),
    "verify: set back by a day between two attacks": _set_in_the_middle(VERIFY, 0.5, -DAY),
    "verify: killed, gone on with 40 years earlier": _set_between(VERIFY, 0.6, -40 * YEAR),
    "serve: set back and forth while it serves": _server,
}
