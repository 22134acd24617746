"""How long a cell will take: from cells like it that are measured, else from a short calibration."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeguard import files
from edgeguard.errors import EdgeGuardError
from edgeguard.patch import grid_positions
from edgeguard.run import CHECKPOINT
from edgeguard.targets import open_engine
from edgeguard.targets.twin import Twin
from study.cells import Cell
from study.engines import BATCH, Bench
from study.grid import Defence, Grid
from study.planning import Data
from study.training import program
from study.work import Place

SHORT, LONG = 2, 8
"""Steps of the two trainings that tell the time of a step."""
GRADIENT = 8.0
"""A gradient of the twin costs about so many answers of the engine; only compares cells of one kind with each other."""
UNSURE = 0.5
"""Attacks per image leave the images that are lost alone: on average so much of the most that they can take."""


@dataclass(frozen=True)
class Rates:
    """What a calibration measured: seconds of a training's start and of one pass over a batch, of an export, and images
    per second that the engine answers and that gradients are taken of through it."""

    start: float
    per_pass: float
    export: float
    answers: float
    gradients: float


@dataclass(frozen=True)
class Estimator:
    """seconds() of a cell. documents: measured cells, also of other settings. rates: None without a calibration."""

    grid: Grid
    data: Data
    side: tuple[int, int]
    documents: Sequence[Mapping[str, Any]]
    rates: Rates | None = None

    def seconds(self, cell: Cell) -> float | None:
        """None where nothing is known."""
        if cell.kind == "train":
            return self._training(cell)
        of_kind = [one for one in self.documents if one["kind"] == cell.kind]
        alike = [one for one in of_kind if one["attack"] == cell.attack]
        if not alike and cell.kind == "attack":
            method = self._settings(cell)["method"]
            alike = [one for one in of_kind if one["inputs"]["method"] == method]
        units = self._units(cell)
        if alike:
            return float(np.mean([one["seconds"] * units / self._document_units(one) for one in alike]))
        if self.rates is None:
            return None
        if cell.kind == "export":
            return self.rates.export
        answers, gradients = self._work(cell.kind, self._settings(cell), self._sources(cell))
        return answers / self.rates.answers + gradients / self.rates.gradients

    def _training(self, cell: Cell) -> float | None:
        defence = _defence(self.grid, cell.defence)
        if defence.ready:
            return 0.0
        steps = self.steps(defence)
        trainings = [one for one in self.documents if one["kind"] == "train" and one["seconds"] > 0]
        alike = [one for one in trainings if one["defence"] == cell.defence]
        if alike:
            return float(np.mean([one["seconds"] * steps / one["result"]["steps"] for one in alike]))
        known = {one.name: one.passes for one in (*self.grid.defences, *self.grid.ablations)}
        others = [
            one["seconds"] / (one["result"]["steps"] * known[one["defence"]])
            for one in trainings if one["defence"] in known
        ]  # fmt: skip
        if others:
            return float(np.median(others)) * defence.passes * steps
        return None if self.rates is None else self.rates.start + self.rates.per_pass * defence.passes * steps

    def steps(self, defence: Defence) -> int:
        """Batches of a training."""
        batch = 128
        options = (*self.grid.extra, *defence.options)
        if "--batch-size" in options:
            batch = int(options[options.index("--batch-size") + 1])
        steps = self.grid.epochs(defence) * max(1, self.data.train_size // batch)
        return min(steps, self.grid.max_steps) if self.grid.max_steps else steps

    def _settings(self, cell: Cell) -> Mapping[str, Any]:
        """What a cell's cost depends on, also where its inputs are not known yet."""
        if cell.inputs is not None:
            return dict(cell.inputs)
        spec = next((one for one in self.grid.attacks if one.name == cell.attack), None)
        budget = asdict(self.grid.budget)
        if cell.kind == "certificate":
            return {"limit": budget["certificate_limit"], "masks": budget["certificate_masks"]}
        if spec is None:
            return budget
        steps = {"per-image": spec.steps or budget["per_image_steps"], "lavan": budget["lavan_steps"]}.get(
            spec.method, budget["steps"]
        )
        restarts = (spec.restarts or budget["per_image_restarts"]) if spec.method == "per-image" else 1
        limit = self.grid.images(spec, _defence(self.grid, cell.defence), cell.width)
        return {**budget, "method": spec.method, "size": spec.size, "placement": spec.placement,
                "limit": limit, "steps": steps, "restarts": restarts}  # fmt: skip

    def _sources(self, cell: Cell) -> int:
        return max(1, len(cell.needs) - 1)

    def _units(self, cell: Cell) -> float:
        answers, gradients = self._work(cell.kind, self._settings(cell), self._sources(cell))
        return answers + GRADIENT * gradients

    def _document_units(self, document: Mapping[str, Any]) -> float:
        rows = document["result"].get("rows", [None])
        answers, gradients = self._work(document["kind"], document["inputs"], len(rows))
        return answers + GRADIENT * gradients

    def _work(self, kind: str, settings: Mapping[str, Any], sources: int) -> tuple[float, float]:
        """Images that the engine answers, and that gradients are taken of."""
        if kind == "accuracy":
            return self.data.test_size, 0.0
        if kind == "certificate":
            masks = settings["masks"] ** 2
            return settings["limit"] * (masks + UNSURE * masks * (masks - 1) / 2), 0.0
        if kind == "craft":
            taken = settings["steps"] * settings["attack_batch"] * settings["restarts"]
            return taken, taken
        if kind != "attack":
            return 1.0, 0.0
        images, method = settings["limit"], settings["method"]
        if method == "patch-rs":
            return UNSURE * settings["queries"] * images, 0.0
        if method in ("per-image", "lavan"):
            taken = UNSURE * settings["steps"] * settings.get("restarts", 1) * images
            return 3 * taken, taken
        size = (settings["size"], settings["size"])
        places = {"random": 1, "corners": 8}.get(settings["placement"], 0)
        places = places or len(grid_positions(self.side, size, settings["stride"]))
        return images * (1 + places * sources), 0.0


def calibrate(place: Place) -> Rates:
    """Two short trainings, an export and a few batches; kept below the work folder for the same settings.

    Raises:
        EdgeGuardError: `edgeguard harden` failed.
    """
    grid = place.grid
    defence = grid.defences[0]
    argv = place.planner().argv(defence, grid.seeds[0], ",".join(grid.trained(defence)))
    mark = [argv, grid.data, place.device, place.threads]
    kept = place.work / "calibration.json"
    if kept.is_file() and files.read_json(kept)["of"] == mark:
        return Rates(**files.read_json(kept)["rates"])
    folder = place.work / "calibration"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    times = {}
    for steps in (SHORT, LONG):
        options = ["--max-steps", str(steps), "--epochs", "1", "--eval-limit", "1", "--out", str(folder / str(steps))]
        command = [program(), "harden", *argv, *place.trainer.given(), *options]
        begin = time.perf_counter()
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode:
            raise EdgeGuardError(f"`{' '.join(command)}` ended with {done.returncode}: {done.stderr.strip()[-500:]}")
        times[steps] = time.perf_counter() - begin
    per_step = max(1e-6, (times[LONG] - times[SHORT]) / (LONG - SHORT))
    start = max(0.0, times[SHORT] - SHORT * per_step)
    rates = Rates(start, per_step / defence.passes, *_engine_rates(place, folder))
    files.write_json(kept, {"of": mark, "rates": asdict(rates)})
    shutil.rmtree(folder)
    return rates


def _engine_rates(place: Place, folder: Path) -> tuple[float, float, float]:
    """Seconds of an export, and images per second: answers, gradients."""
    train, test = place.splits()
    bench = Bench(place.cache, folder, train, test, place.grid.data, place.threads)
    run = folder / str(LONG)
    training = Cell("train", "calibration", 0, place.grid.widths[0], inputs={})
    inputs = {"checkpoint_sha256": files.sha256(run / CHECKPOINT), "target": "ort"}
    begin = time.perf_counter()
    artifact = bench.artifact(
        Cell("export", "calibration", 0, place.grid.widths[0], inputs=inputs, needs=(training,)), run
    )
    export = time.perf_counter() - begin
    images = test.images(np.arange(min(BATCH, len(test))))
    twin = Twin(artifact.graph()).eval().requires_grad_(False)
    with open_engine(artifact, "ort", place.threads) as engine:
        engine(images)
        begin = time.perf_counter()
        for _ in range(5):
            engine(images)
        answers = 5 * len(images) / (time.perf_counter() - begin)
    rates = []
    for _ in range(3):
        begin = time.perf_counter()
        leaf = torch.from_numpy(images).float().requires_grad_()
        twin(leaf).sum().backward()
        rates.append(len(images) / (time.perf_counter() - begin))
    return export, answers, float(np.median(rates))


def _defence(grid: Grid, name: str) -> Defence:
    return next(one for one in (*grid.defences, *grid.ablations) if one.name == name)


def duration(seconds: float) -> str:
    """For a person."""
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
