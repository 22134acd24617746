"""Computing cells, one after the other or several at a time; each is kept as soon as it is finished."""

from __future__ import annotations

import functools
import importlib.metadata
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgeguard.data import Dataset, load_splits
from edgeguard.errors import EdgeGuardError
from edgeguard.targets import cpu_flags
from study.cells import Cache, Cell
from study.engines import Bench, decode_patch
from study.grid import Grid
from study.planning import Data, Planner
from study.training import Trainer

Say = Callable[[str], None]
MODELS = "models"
"""Below the results: what trainings ended with."""


@dataclass(frozen=True)
class Place:
    """Everything a worker needs, picklable. results, work: folders. threads: of one worker; 0 leaves it open."""

    grid: Grid
    results: Path
    work: Path
    device: str = "auto"
    threads: int = 0

    @property
    def cache(self) -> Cache:
        return Cache(self.results)

    @property
    def trainer(self) -> Trainer:
        return Trainer(self.grid, self.work, self.results / MODELS, self.device, self.threads)

    def splits(self) -> tuple[Dataset, Dataset]:
        """Training and test images, as the first seed's training splits them; loaded once in a process."""
        return _splits(self.grid.data, self.grid.image_size)

    def planner(self) -> Planner:
        """One for all calls in a process, since it remembers what trainings ended with."""
        return _planner(self)


@functools.lru_cache(maxsize=1)
def _planner(place: Place) -> Planner:
    train, test = place.splits()
    return Planner(place.grid, place.cache, Data(train.sha256, test.sha256, len(train), len(test)))


@functools.lru_cache(maxsize=2)
def _splits(data: str, image_size: int | None) -> tuple[Dataset, Dataset]:
    return load_splits(data, image_size)


def compute(place: Place, cell: Cell) -> float:
    """Compute a cell whose needs are finished, and keep it. Returns: its seconds.

    Raises:
        EdgeGuardError: a training, an export or an attack failed.
    """
    if place.threads:
        torch.set_num_threads(place.threads)
    begin = time.perf_counter()
    if cell.kind == "train":
        result, seconds = place.trainer.train(cell)
    else:
        result = _measure(place, cell)
        seconds = time.perf_counter() - begin
    place.cache.write(cell, result, seconds, environment(place))
    return seconds


def _measure(place: Place, cell: Cell) -> dict[str, Any]:
    train, test = place.splits()
    bench = Bench(place.cache, place.work, train, test, place.grid.data, place.threads)
    export = cell if cell.kind == "export" else cell.needs[0]
    run = place.trainer.model(export.needs[0])
    if cell.kind == "export":
        return bench.export(cell, run)
    artifact = bench.artifact(export, run)
    if cell.kind == "accuracy":
        return bench.accuracy(artifact)
    if cell.kind == "certificate":
        return bench.certificate(artifact, cell.inputs)
    if cell.kind == "craft":
        return bench.craft(artifact, cell.inputs)
    patches = {craft.width: decode_patch(place.cache.read(craft)["result"]) for craft in cell.needs[1:]}
    return bench.attack(artifact, cell.inputs, patches)


def environment(place: Place) -> dict[str, Any]:
    """Versions and machine; no clock and no user name."""
    packages = ("edgeguard", "numpy", "torch", "onnxruntime")
    return {
        "versions": {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}},
        "machine": platform.machine(), "cpu_flags": cpu_flags(), "threads": place.threads,
        "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }  # fmt: skip


def drive(place: Place, filters: Mapping[str, tuple[str, ...]], jobs: int, say: Say, after: Callable[[], None]) -> int:
    """Compute all cells that the filters let through and that are not finished.

    after: called after every cell, in this process. Returns: how many were computed.

    Raises:
        EdgeGuardError: a cell failed, or a worker was killed; what is finished stays.
    """
    planner, cache, count = place.planner(), place.cache, 0

    def todo(busy: set[str]) -> tuple[list[Cell], int]:
        left = [cell for cell in planner.cells(filters) if not cache.has(cell)]
        ready = [cell for cell in left if cell.name not in busy and all(map(cache.has, cell.needs))]
        return ready, len(left)

    if jobs == 1:
        while (found := todo(set()))[0]:
            cell = found[0][0]
            say(f"{cell.name}: {found[1]} to do")
            say(f"{cell.name}: {compute(place, cell):.0f} s")
            after()
            count += 1
        return count
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        busy: dict[Future[float], Cell] = {}
        while True:
            ready, left = todo({cell.name for cell in busy.values()})
            for cell in ready[: jobs - len(busy)]:
                say(f"{cell.name}: {left} to do")
                busy[pool.submit(compute, place, cell)] = cell
            if not busy:
                return count
            for future in wait(busy, return_when=FIRST_COMPLETED).done:
                cell = busy.pop(future)
                say(f"{cell.name}: {_outcome(future, cell):.0f} s")
                after()
                count += 1


def _outcome(future: Future[float], cell: Cell) -> float:
    try:
        return future.result()
    except BrokenProcessPool as exc:
        raise EdgeGuardError(
            f"a worker was killed at {cell.name} or beside it; start the study again, perhaps with fewer --jobs"
        ) from exc


def split_threads(jobs: int) -> int:
    """Threads for each of several workers, also in what they start; 0, the choice of each library, for one worker."""
    if jobs == 1:
        return 0
    threads = max(1, (os.cpu_count() or 1) // jobs)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    return threads
