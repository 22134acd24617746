"""Faults and what comes of them: kills, full disks, clocks that are set, two writers of one place, servers that break.

What is tried, and held to what, is in tests/faults. Writes results/faults.json, and the tables of docs/reliability.md. Exit code 1
where anything came out otherwise than it should. Needs Linux; mounts a small tmpfs where it may.
"""

from __future__ import annotations

import json
import platform
import re
import resource
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jobs import Workshop

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "faults")]
RESULT, PAGE = ROOT / "benchmarks" / "results" / "faults.json", ROOT / "docs" / "reliability.md"
WIDEST = 200
"""Characters of a cell."""
BEGIN, END = "<!-- begin {} -->\n", "<!-- end {} -->\n"
TITLES = {
    "kill": "SIGKILL", "disk": "full disk", "clock": "clock set", "writers": "two writers of one place",
    "server": "server that breaks",
}  # fmt: skip


@dataclass
class Tried:
    """What was tried, a row each with `kind`, `job`, `fault`, `right` and `said`. folder: which nobody needs to know."""

    folder: Path
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, kind: str, job: str, fault: str, call: Callable[[], Any], **more: Any) -> None:
        row: dict[str, Any] = {"kind": kind, "job": job, "fault": fault, "right": True, **more}
        try:
            row["said"] = tidy(call(), self.folder)
        except Exception as exc:
            row |= {"right": False, "said": "".join(traceback.format_exception(exc))[-1500:]}
        print(f"{'right' if row['right'] else 'WRONG'}: {kind}, {job}, {fault}: {row['said']}", file=sys.stderr, flush=True)
        self.rows.append(row)


def try_kills(tried: Tried, workshop: Workshop, folder: Path) -> str:
    import kill_points
    import servers

    for point in kill_points.every_point(workshop):
        tried("kill", point.job.name, point.words, lambda point=point: kill_points.kill(workshop, point).said)
    served = servers.Served(workshop)
    for name, kill in servers.kills(served, brief=False).items():
        tried("kill", "serve", name, lambda kill=kill: kill(served))
    return "SIGKILL of the process to itself at an operation that is counted; of serve also from outside"


def try_servers(tried: Tried, workshop: Workshop, folder: Path) -> str:
    import servers

    with servers.broken(workshop) as broken:
        for name, fault in servers.faults(broken.engine).items():
            tried("server", "verify", name, lambda fault=fault: broken.lost(fault))
        for name in servers.PASSING:
            tried("server", "verify", f"{name}, twice", lambda name=name: broken.passing(name))
    return "Python's http.server, in front of the reference engine"


def try_writers(tried: Tried, workshop: Workshop, folder: Path) -> str:
    import two_writers

    for meeting in two_writers.meetings(workshop):
        tried("writers", meeting.job.name, f"the first one stopped at: {meeting.at}",
              lambda meeting=meeting: two_writers.meet(workshop, meeting))  # fmt: skip
    return "SIGSTOP of the first process at an operation that is counted, until the second one has ended"


def try_disks(tried: Tried, workshop: Workshop, folder: Path) -> str:
    import full_disk

    with full_disk.small_disk(folder / "disk") as disk:
        for job in full_disk.JOBS:
            for share in full_disk.SHARES:
                tried("disk", job.name, f"room for {share:.0%} of the result",
                      lambda job=job, share=share: full_disk.fill(workshop, disk, job, share))  # fmt: skip
        tried("disk", "export", "of temporary files", lambda: full_disk.no_temporary_files(workshop, disk))
        tried("disk", "export, harden, verify", "of stdout, and of stderr", lambda: full_disk.full_streams(workshop))
        return disk.way


def try_clocks(tried: Tried, workshop: Workshop, folder: Path) -> str:
    import clocks

    with clocks.clocked(workshop, folder / "clocked") as (clock, nursery):
        for name, scenario in clocks.SCENARIOS.items():
            clock.set(0)
            job, _, fault = name.partition(": ")
            tried("clock", job, fault, lambda scenario=scenario: scenario(workshop, clock, nursery))
        return clock.way


KINDS: dict[str, Callable[[Tried, Workshop, Path], str]] = {
    "kill": try_kills, "server": try_servers, "writers": try_writers, "disk": try_disks, "clock": try_clocks,
}  # fmt: skip


def tidy(said: object, folder: Path) -> object:
    """A sentence without what is of this run alone: the temporary folder and the ports."""
    return re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:8000", said.replace(str(folder), "")) if isinstance(said, str) else said


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Cells are cut where they are long."""
    lines = [list(head), ["---"] * len(list(head)), *rows]
    cells = [[str(cell).replace("|", "/") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(cell if len(cell) <= WIDEST else cell[:WIDEST] + '...' for cell in line)} |\n" for line in cells)


def tables(document: dict[str, Any]) -> dict[str, str]:
    """The tables of the page, by name."""
    rows = document["rows"]
    groups: dict[tuple[str, str], list[bool]] = {}
    for row in rows:
        groups.setdefault((row["kind"], row["job"]), []).append(row["right"])
    counts = [(TITLES[kind], job, len(found), sum(found)) for (kind, job), found in groups.items()]
    counts.sort(key=lambda row: (list(TITLES.values()).index(row[0]), row[1]))
    counts.append(("all", "", len(rows), sum(row["right"] for row in rows)))
    said = [(row["fault"], str(row["said"]).partition("; what was found")[0]) for row in rows if row["kind"] == "server"]
    disk = [(row["job"], row["fault"], row["said"]) for row in rows if row["kind"] == "disk"]
    return {
        "counts": table(("fault", "command", "tried", "as it should be"), counts),
        "servers": table(("the server", "what `verify` says"), said),
        "disks": table(("command", "full disk", "what it says"), disk),
    }


def write_page(document: dict[str, Any]) -> None:
    """Put the tables between their marks."""
    text = PAGE.read_text(encoding="utf-8")
    for name, content in tables(document).items():
        before, _, rest = text.partition(BEGIN.format(name))
        _, _, after = rest.partition(END.format(name))
        text = f"{before}{BEGIN.format(name)}\n{content}\n{END.format(name)}{after}"
    PAGE.write_text(text, encoding="utf-8")


def main(kinds: list[str]) -> None:
    """kinds: that are tried now, the rows of others are kept; `page` writes the page alone; all, where none is named."""
    from commands import Nursery
    from jobs import Workshop

    document = json.loads(RESULT.read_text(encoding="utf-8")) if kinds else {"ways": {}, "cpu_seconds": {}, "rows": []}
    document |= {"schema": "edgeguard.faults/1", "python": platform.python_version(), "platform": platform.platform()}
    for kind in [kind for kind in KINDS if kind in kinds or not kinds]:
        before = cpu_seconds()
        with tempfile.TemporaryDirectory(prefix="edgeguard-faults-") as name:
            tried = Tried(Path(name))
            with Nursery(Path(name) / "logs") as nursery:
                document["ways"][kind] = KINDS[kind](tried, Workshop(Path(name) / "workshop", nursery), Path(name))
        document["cpu_seconds"][kind] = round(cpu_seconds() - before)
        document["rows"] = [row for row in document["rows"] if row["kind"] != kind] + tried.rows
        RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    write_page(document)
    wrong = [row for row in document["rows"] if not row["right"]]
    print(f"{len(document['rows'])} tried, {len(wrong)} came out otherwise than they should")
    sys.exit(1 if wrong else 0)


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


if __name__ == "__main__":
    main(sys.argv[1:])
