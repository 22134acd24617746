"""The smallest real jobs, what they leave, and whether every file of it can be read."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from commands import Ended, Nursery

from edgeguard import files
from edgeguard.artifact import Artifact
from edgeguard.data import load_dataset
from edgeguard.errors import EdgeGuardError
from edgeguard.patch import Patch
from edgeguard.patch_files import load_patch
from edgeguard.report.html import render_html
from edgeguard.report.read import read_report
from edgeguard.verify.bundle import Bundle

SIDE, DATA = 12, "npz:digits-{split}.npz"
TRAINING = (
    "--model", "resnet8", "--data", DATA, "--bits", "8,2", "--batch-size", "32", "--epochs", "2", "--pretrain-epochs", "1",
    "--patch-sizes", "3", "--calibration-images", "32", "--eval-limit", "40", "--no-compile", "--no-amp", "--threads", "1",
)  # fmt: skip
ATTACKING = (
    "--budget", "quick", "--attack", "a-qapa,patch-rs", "--patch-size", "4", "--steps", "4", "--universal-queries", "300",
    "--limit", "40", "--stride", "4",
)  # fmt: skip
VARYING: Mapping[str, tuple[str, ...]] = {"report.json": ("timing",)}
"""Keys of a result that tell how long it took; all else must be equal to the byte."""


@dataclass(frozen=True)
class Job:
    """A command. needs: of what `prepared` makes. out: what it writes. again: the command after one that was cut short."""

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...]
    out: str
    again: Callable[[Path], tuple[str, ...]] | None = None

    def after(self, folder: Path) -> tuple[str, ...] | None:
        """What a user types after it was cut short; None where the result is there already."""
        if self.again is not None:
            return self.again(folder)
        return None if (folder / self.out).exists() else self.command


def _training_after(folder: Path) -> tuple[str, ...]:
    begun = (folder / "trained" / "config.json").is_file()
    return ("harden", "--resume", "trained", "--threads", "1") if begun else HARDEN.command


HARDEN = Job("harden", ("harden", *TRAINING, "--out", "trained"), ("data",), "trained", _training_after)
RESUME = Job("harden --resume", ("harden", "--resume", "begun", "--threads", "1"), ("data", "begun"), "begun",
             lambda _: RESUME.command)  # fmt: skip
CALIBRATE = Job(
    "calibrate", ("calibrate", "--model", "resnet8", "--data", DATA, "--bits", "8", "--calibration-images", "32", "--eval-limit",
                  "40", "--threads", "1", "--out", "calibrated"), ("data",), "calibrated",
)  # fmt: skip
EXPORT = Job("export", ("export", "run", "--bits", "2", "--proof-images", "8", "--out", "artifact-2"), ("data", "run"),
             "artifact-2")  # fmt: skip
POOL = Job("export --pool", ("export", "run", "--pool", "--bits", "8,2", "--proof-images", "8", "--seed", "1", "--out", "pool"),
           ("data", "run"), "pool")  # fmt: skip
VERIFY = Job("verify", ("verify", "artifact", *ATTACKING, "--out", "verified"), ("data", "artifact"), "verified")
ATTACK = Job(
    "attack", ("attack", "artifact", "--attack", "a-qapa", "--patch-size", "4", "--steps", "4", "--limit", "40", "--out",
               "attacked"), ("data", "artifact"), "attacked",
)  # fmt: skip
REPORT = Job("report", ("report", "earlier", "--out", "pages"), ("earlier",), "pages")
PAGE = Job("report --html", ("report", "earlier", "--html", "page.html"), ("earlier",), "page.html")
JOBS = (HARDEN, RESUME, CALIBRATE, EXPORT, POOL, VERIFY, ATTACK, REPORT, PAGE)


class Workshop:
    """What jobs begin with, made once. runs every job undisturbed once, when it is first asked for."""

    def __init__(self, folder: Path, nursery: Nursery) -> None:
        self.folder, self.nursery, self._count = folder, nursery, 0
        self._whole: dict[str, tuple[dict[str, str], Ended]] = {}
        self._sizes: dict[str, tuple[int, int]] = {}
        self._store = folder / "needs"
        self._store.mkdir(parents=True)
        for split, count in (("train", 96), ("test", 64)):
            digits = load_dataset("digits", split, SIDE).subset(np.arange(count))
            images = digits.images(np.arange(count)).transpose(0, 2, 3, 1)
            np.savez(self._store / f"digits-{split}.npz", images=images, labels=digits.labels)
        self._must("harden", *TRAINING, "--out", "run")
        fault = {"at": "named checkpoint.safetensors 2", "act": "kill"}
        begun = self.nursery.run(self._store, *HARDEN.command[:-1], "begun", fault=fault)
        assert begun.code == -9, begun
        self._must("export", "run", "--bits", "8", "--proof-images", "8", "--out", "artifact")
        self._must("verify", "artifact", *ATTACKING, "--out", "earlier")

    def _must(self, *command: str) -> None:
        ended = self.nursery.run(self._store, *command)
        assert ended.code == 0, ended.stderr

    def bench(self, job: Job, where: Path | None = None) -> Path:
        """A new folder with what a job needs, and with earlier results, which must not change."""
        self._count += 1
        folder = (where or self.folder / "benches") / str(self._count)
        folder.mkdir(parents=True)
        for need in job.needs:
            for path in self._store.glob("digits-*.npz" if need == "data" else need):
                if path.is_dir():
                    shutil.copytree(path, folder / path.name)
                else:
                    shutil.copy2(path, folder / path.name)
        return folder

    def whole(self, job: Job) -> tuple[dict[str, str], Ended]:
        """What the job leaves when nothing disturbs it, by `contents`, and how it ended, with its operations."""
        if job.name not in self._whole:
            folder = self.bench(job)
            ended = self.nursery.run(folder, *job.command, listed=True)
            assert ended.code == 0, ended.stderr
            assert not leftovers(folder)
            self._whole[job.name] = contents(folder / job.out), ended
            paths = [path for path in [folder / job.out, *(folder / job.out).rglob("*")] if path.is_file()]
            sizes = [path.stat().st_size for path in paths]
            self._sizes[job.name] = max(sizes), sum(sizes)
            shutil.rmtree(folder)
        return self._whole[job.name]

    def end_as_whole(self, job: Job, folder: Path, nursery: Nursery | None = None) -> Ended | None:
        """Type what a user would type now, and hold the result against an undisturbed one."""
        command, ended = job.after(folder), None
        if command is not None:
            ended = (nursery or self.nursery).run(folder, *command)
            assert ended.code == 0, ended.stderr
            assert "Traceback" not in ended.stderr, ended.stderr
        self.same(job, folder)
        return ended

    def same(self, job: Job, folder: Path) -> None:
        """Raises AssertionError unless the job's result is that of an undisturbed run; says which files differ."""
        found, wanted = contents(folder / job.out), self.whole(job)[0]
        assert found == wanted, sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))

    def sizes(self, job: Job) -> tuple[int, int]:
        """Bytes of the largest file of the job's result, and of all."""
        self.whole(job)
        return self._sizes[job.name]


def contents(path: Path) -> dict[str, str]:
    """SHA-256 of every file of a result by its name, without what `VARYING` lists; pages are held against their report."""
    if path.is_file():
        return {"": files.sha256(path)}
    found = {}
    for file in sorted(entry for entry in path.rglob("*") if entry.is_file()):
        data = file.read_bytes()
        if file.name in VARYING:
            document = json.loads(data)
            data = json.dumps({key: value for key, value in document.items() if key not in VARYING[file.name]}).encode()
        if file.name == "report.html" and (file.parent / "report.json").is_file():
            assert data == render_html(read_report(file.parent / "report.json")).encode()
            continue
        found[str(file.relative_to(path))] = hashlib.sha256(data).hexdigest()
    return found


def leftovers(folder: Path) -> list[str]:
    """Files and folders that an undisturbed job does not leave."""
    left = [path for path in folder.rglob("*") if path.name.startswith(".") or path.suffix == ".unfinished"]
    return sorted(str(path.relative_to(folder)) for path in left)


def _run(path: Path) -> None:
    from edgeguard.run import Run

    Run.load(path.parent).load_model()


def _lines(path: Path) -> None:
    for line in path.read_text().splitlines():
        json.loads(line)


def _whole_text(path: Path) -> None:
    assert path.read_text().rstrip().endswith(">"), path


READERS: Mapping[str, Callable[[Path], Any]] = {
    "config.json": _run, "checkpoint.safetensors": _run, "metrics.jsonl": _lines, "report.json": read_report,
    "bundle.json": lambda path: Bundle.load(path.parent),
    "report.html": _whole_text, "page.html": _whole_text, "junit.xml": _whole_text,
    "report.sarif": files.read_json, "manifest.json": lambda path: Artifact.load(path.parent).graph(),
    "graph.npz": lambda path: Artifact.load(path.parent).graph(), "model.onnx": lambda path: Artifact.load(path.parent).graph(),
    "patch.npz": Patch.load, "patch.png": load_patch, "patch-large.png": load_patch,
    "patch.pdf": lambda path: path.read_bytes().index(b"%%EOF"),
}  # fmt: skip


def read_all(folder: Path) -> tuple[int, list[str]]:
    """Open every file that has its name: how many can be read, and the sentences with which the others are refused.

    Raises:
        Exception: a file is corrupt, and its reader says something else than a sentence.
    """
    readable, refused = 0, []
    for path in sorted(entry for entry in folder.rglob("*") if entry.is_file()):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        reader = READERS.get(path.name)
        if path.parent.name == "patches":
            reader = Patch.load
        elif reader is None and path.suffix == ".npz":
            def reader(path: Path) -> Any:
                return files.read_npz(path, 1 << 30)
        elif path.name == "pool.json":
            from edgeguard.pool_artifact import Pool

            reader = lambda path: Pool.load(path.parent)  # noqa: E731
        assert reader is not None, f"nothing reads {path}"
        try:
            reader(path)
            readable += 1
        except EdgeGuardError as exc:
            refused.append(str(exc))
    return readable, refused
