"""Training runs: the real `edgeguard harden`, each in a folder of its own, continued where it was interrupted.

What a training ends with is kept among the results as a packed run, without the state of the training: engines of every
row can be exported and attacked again by whoever has the results.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer.main
from make_zoo import public_config

from edgeguard import files, folders, zoo
from edgeguard.cli.app import app
from edgeguard.defences.config import passes_per_batch
from edgeguard.defences.job import job_from_json
from edgeguard.errors import EdgeGuardError, InputError, MissingDependency
from edgeguard.run import CHECKPOINT, CONFIG, METRICS, MODEL, Run
from study.cells import Cell
from study.grid import Defence, Grid

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1
POLL = 0.5
"""Seconds between two looks at a training; at most so much of its time is lost when the study is killed."""


@dataclass(frozen=True)
class Trainer:
    """Where trainings lie and what they run on.

    work: folder of runs. models: folder of packed runs. device: as `--device` takes it. threads: 0 leaves it open.
    """

    grid: Grid
    work: Path
    models: Path
    device: str = "auto"
    threads: int = 0

    def folder(self, cell: Cell) -> Path:
        return self.work / "runs" / f"{cell.name}.{str(cell.key)[:16]}"

    def model(self, cell: Cell) -> Path:
        """The packed run of a finished training."""
        if "ready" in cell.inputs:
            return zoo.resolve(zoo.PREFIX + cell.inputs["ready"])
        return self.models / f"{cell.name}.{str(cell.key)[:16]}"

    def train(self, cell: Cell) -> tuple[dict[str, Any], float]:
        """Train, or go on; a ready model is only described.

        Returns: the result of the cell, and seconds over all starts of its command; 0 where they are not known.

        Raises:
            EdgeGuardError: the command failed; says what it said.
        """
        if "ready" in cell.inputs:
            seconds = zoo.ZooModel.load(self.model(cell)).card["training"]["seconds"]
            return self._result(Run.load(self.model(cell))), 0.0 if seconds is None else float(seconds)
        folder = self.folder(cell)
        folder.parent.mkdir(parents=True, exist_ok=True)
        clock = folder.with_name(f"{folder.name}.json")
        known = files.read_json(clock) if clock.is_file() else {"seconds": 0.0, "finished": False}
        seconds = float(known["seconds"])
        if not known["finished"]:
            seconds = self._run(self.command(cell), seconds, clock)
        return self._result(self._packed(Run.load(folder), cell)), seconds

    def _packed(self, run: Run, cell: Cell) -> Run:
        """The run without the state of its training, and without paths of this machine."""
        if not self.model(cell).is_dir():
            with folders.folder_transaction(self.model(cell)) as folder:
                files.write_json(folder / CONFIG, public_config(run, None))
                tensors = {MODEL + name: value for name, value in run.load_model().state_dict().items()}
                Run.load(folder).write_checkpoint(tensors, {"step": run.read_checkpoint()[1]["step"]})
                shutil.copyfile(run.path / METRICS, folder / METRICS)
        return Run.load(self.model(cell))

    def command(self, cell: Cell) -> list[str]:
        """The command that starts the training, or continues it where there is a checkpoint."""
        folder = self.folder(cell)
        if (folder / CHECKPOINT).is_file():
            return [program(), "harden", "--resume", str(folder), "--device", self.device, *self._threads()]
        if folder.exists():  # killed before the first checkpoint, so there is nothing to lose
            shutil.rmtree(folder)
        return [program(), "harden", *cell.inputs["argv"], *self.given(), "--out", str(folder)]

    def given(self) -> list[str]:
        """Options of this machine: where data and weights lie, and the device."""
        weights = ["--weights", str(self.grid.weights)] if self.grid.weights is not None else []
        return ["--data", self.grid.data, *weights, "--device", self.device, *self._threads()]

    def _threads(self) -> list[str]:
        return ["--threads", str(self.threads)] if self.threads else []

    def _run(self, command: Sequence[str], before: float, clock: Path) -> float:
        """Wait for a command, and keep its time on disk meanwhile. Returns: seconds over all starts."""
        environment = dict(os.environ)
        if self.threads:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        log = clock.with_suffix(".log")
        begin = time.monotonic()
        with (
            log.open("ab") as sink,
            subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, env=environment, start_new_session=True,
                preexec_fn=_end_with_parent if LIBC is not None else None,
            ) as process,
        ):  # fmt: skip
            try:
                while process.poll() is None:
                    files.write_json(clock, {"seconds": before + time.monotonic() - begin, "finished": False})
                    time.sleep(POLL)
            except BaseException:
                process.send_signal(signal.SIGINT)  # it writes a checkpoint
                raise
        seconds = before + time.monotonic() - begin
        files.write_json(clock, {"seconds": seconds, "finished": process.returncode == 0})
        if process.returncode:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            said = next((line.strip(" │") for line in reversed(lines) if any(map(str.isalpha, line))), "nothing")
            raise EdgeGuardError(f"`{' '.join(command)}` ended with {process.returncode}: {said} (see {log})")
        return seconds

    def _result(self, run: Run) -> dict[str, Any]:
        last = json.loads((run.path / METRICS).read_text(encoding="utf-8").splitlines()[-1])
        passes = passes_per_batch(job_from_json(run).config)
        return {
            "checkpoint_sha256": files.sha256(run.checkpoint), "steps": last["step"], "epochs": last["epoch"],
            "passes_per_batch": passes, "train_size": run.config["data"]["train_size"], "metrics": last,
            "versions": run.config["versions"], "device": self.device, "threads": self.threads,
        }  # fmt: skip


def _end_with_parent() -> None:
    """In a new process: end when the study is killed, so that no two trainings write into one folder. Linux only."""
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def program() -> str:
    """The installed console script.

    Raises:
        MissingDependency: it is not there.
    """
    path = Path(sysconfig.get_path("scripts")) / ("edgeguard.exe" if os.name == "nt" else "edgeguard")
    if not path.is_file():
        raise MissingDependency(f"the command edgeguard is not at {path}; install the project with: pip install .")
    return str(path)


def check_options(grid: Grid, defences: Sequence[Defence]) -> None:
    """Hold the options of all defences against those that `edgeguard harden` has.

    Raises:
        InputError: an option that it does not have; says whose.
    """
    commands: dict[str, Any] = getattr(typer.main.get_command(app), "commands")  # noqa: B009
    known = {name for parameter in commands["harden"].params for name in (*parameter.opts, *parameter.secondary_opts)}
    for defence in defences:
        for option in (*grid.extra, *defence.options):
            if option.startswith("--") and option.partition("=")[0] not in known:
                raise InputError(
                    f"{defence.name}: `edgeguard harden` has no option {option}; correct the table in benchmarks/study/grid.py"
                )
