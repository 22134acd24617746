"""From a grid to cells in the order in which they are computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeguard import files, zoo
from edgeguard.errors import InputError
from edgeguard.zoo import ZooModel
from study.cells import Cache, Cell
from study.grid import MEASURES, AttackSpec, Defence, Grid

RESERVED = 2000
"""Fixed, so that patches need not be crafted anew when more images are judged."""
FILTERS = ("defence", "seed", "width", "attack")
Filters = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Data:
    """Hashes of what a training depends on besides its options, and how many images it trains on."""

    train_sha256: str
    test_sha256: str
    train_size: int
    test_size: int


def parse_filters(texts: Sequence[str], grid: Grid) -> dict[str, tuple[str, ...]]:
    """From `KEY=VALUE,...` to allowed values for each key; a key that is not named allows everything.

    Raises:
        InputError: no such key or value in the grid; says which there are.
    """
    known = {
        "defence": [one.name for one in (*grid.defences, *grid.ablations)], "seed": [str(seed) for seed in grid.seeds],
        "width": list(grid.widths), "attack": [*(spec.name for spec in grid.attacks), *MEASURES],
    }  # fmt: skip
    found: dict[str, tuple[str, ...]] = {}
    for text in texts:
        key, _, values = text.partition("=")
        if key not in FILTERS or key in found:
            raise InputError(f"--only {text!r}: expected {', '.join(f'{name}=...' for name in FILTERS)}, each once")
        chosen = tuple(values.split(","))
        unknown = [value for value in chosen if value not in known[key]]
        if unknown:
            raise InputError(
                f"--only {text!r}: no {key} {unknown[0]!r} in the study; there are {', '.join(known[key])}"
            )
        found[key] = chosen
    return found


class Planner:
    """Makes the cells of a grid. What earlier cells have found is read from the cache."""

    def __init__(self, grid: Grid, cache: Cache, data: Data) -> None:
        self._grid, self._cache, self._data = grid, cache, data
        self._weights = files.sha256(grid.weights) if grid.weights is not None else None
        self._checkpoints: dict[str, str] = {}

    def cells(self, filters: Filters | None = None) -> list[Cell]:
        """All cells that the filters let through, with those that they need, each after what it needs and once."""
        wanted = filters or {}
        ordered: dict[str, Cell] = {}
        for defence in (*self._grid.defences, *self._grid.ablations):
            seeds = self._grid.seeds[:1] if defence.ablation or defence.ready else self._grid.seeds
            for seed in seeds:
                if _passes(wanted, "defence", defence.name) and _passes(wanted, "seed", str(seed)):
                    for cell in self._wanted(defence, seed, wanted):
                        _add(cell, ordered)
        return list(ordered.values())

    def argv(self, defence: Defence, seed: int, widths: str) -> list[str]:
        """Options of `edgeguard harden` that say what is trained; data, weights and device are left to the caller."""
        grid = self._grid
        size = ["--image-size", str(grid.image_size)] if grid.image_size is not None else []
        steps = ["--max-steps", str(grid.max_steps)] if grid.max_steps else []
        return ["--model", grid.model, "--bits", widths, "--epochs", str(grid.epochs(defence)), "--seed", str(seed),
                *size, *steps, *grid.extra, *defence.options]  # fmt: skip

    def _wanted(self, defence: Defence, seed: int, filters: Filters) -> list[Cell]:
        found: list[Cell] = []
        for width in self._grid.judged(defence):
            if not _passes(filters, "width", width):
                continue
            found.append(self._export(defence, seed, width))
            if _passes(filters, "attack", "accuracy"):
                found.append(self._measure("accuracy", defence, seed, width))
            for spec in self._grid.attacked_by(defence, width):
                if _passes(filters, "attack", spec.name):
                    found.append(self._attack(defence, seed, width, spec))
            if not defence.ablation and _passes(filters, "attack", "certificate"):
                found.append(self._measure("certificate", defence, seed, width))
        return found

    def train(self, defence: Defence, seed: int, width: str) -> Cell:
        """The training of an engine, or the ready model that stands for it."""
        widths = width if defence.apart else ",".join(self._grid.trained(defence))
        if defence.ready:
            return Cell("train", defence.name, seed, widths, inputs=self._ready(defence.ready))
        data = {"train_sha256": self._data.train_sha256, "test_sha256": self._data.test_sha256}
        inputs = {"argv": self.argv(defence, seed, widths), "weights_sha256": self._weights, "data": data}
        return Cell("train", defence.name, seed, widths, inputs=inputs)

    def _ready(self, name: str) -> dict[str, Any]:
        card = ZooModel.load(zoo.resolve(zoo.PREFIX + name)).card
        if card["data"]["test_sha256"] != self._data.test_sha256:
            raise InputError(f"zoo:{name} was made for other data than {self._grid.data}; leave out --ready")
        return {"ready": name, "files": card["files"]}

    def _export(self, defence: Defence, seed: int, width: str) -> Cell:
        training = self.train(defence, seed, width)
        checkpoint = self._checkpoint(training)
        inputs = None if checkpoint is None else {"checkpoint_sha256": checkpoint, "width": width, "target": "ort"}
        return Cell("export", defence.name, seed, width, inputs=inputs, needs=(training,))

    def _checkpoint(self, training: Cell) -> str | None:
        """SHA-256 of what a training ended with; None before that."""
        if training.name not in self._checkpoints and self._cache.has(training):
            self._checkpoints[training.name] = str(self._cache.read(training)["result"]["checkpoint_sha256"])
        return self._checkpoints.get(training.name)

    def _measure(self, kind: str, defence: Defence, seed: int, width: str) -> Cell:
        export, budget = self._export(defence, seed, width), self._grid.budget
        settings = {} if kind == "accuracy" else {
            "limit": budget.certificate_limit, "size": budget.certificate_size, "masks": budget.certificate_masks,
        }  # fmt: skip
        return Cell(kind, defence.name, seed, width, inputs=self._with_data(export, settings), needs=(export,))

    def _craft(self, defence: Defence, seed: int, source: str, spec: AttackSpec) -> Cell:
        export, budget = self._export(defence, seed, source), self._grid.budget
        settings = {
            "method": spec.method, "size": spec.size, "steps": budget.steps, "attack_batch": budget.attack_batch,
            "restarts": budget.restarts, "craft_limit": budget.craft_limit, "reserved": _reserved(self._grid),
        }  # fmt: skip
        name = f"{spec.method}-{spec.size}"
        return Cell("craft", defence.name, seed, source, name, self._with_data(export, settings), (export,))

    def _attack(self, defence: Defence, seed: int, width: str, spec: AttackSpec) -> Cell:
        export = self._export(defence, seed, width)
        crafts: tuple[Cell, ...] = ()
        if spec.universal:
            crafts = tuple(self._craft(defence, seed, source, spec) for source in self._grid.sources(defence, width))
        settings = _settings(spec, self._grid, self._grid.images(spec, defence, width))
        inputs = self._with_data(export, settings)
        if inputs is not None and all(craft.key is not None for craft in crafts):
            inputs["crafts"] = {craft.width: craft.key for craft in crafts}
        elif crafts:
            inputs = None
        return Cell("attack", defence.name, seed, width, spec.name, inputs, (export, *crafts))

    def _with_data(self, export: Cell, settings: dict[str, Any]) -> dict[str, Any] | None:
        if export.inputs is None:
            return None
        data = {"train_sha256": self._data.train_sha256, "test_sha256": self._data.test_sha256}
        return {"engine": export.inputs, "data": data, **settings}


def _reserved(grid: Grid) -> int:
    """The first so many test images may be judged, so that no patch is crafted on a copy of one of them."""
    return max(RESERVED, grid.budget.limit, grid.budget.per_image_limit, grid.budget.query_limit)


def _settings(spec: AttackSpec, grid: Grid, limit: int) -> dict[str, Any]:
    """What an attack's verdict depends on besides its patches. limit: judged images."""
    budget = grid.budget
    found: dict[str, Any] = {"method": spec.method, "size": spec.size, "placement": spec.placement,
                             "limit": limit}  # fmt: skip
    if spec.placement == "worst":
        found["stride"] = budget.stride
    if spec.method == "per-image":
        found |= {
            "steps": spec.steps or budget.per_image_steps,
            "restarts": spec.restarts or budget.per_image_restarts,
            "attack_batch": budget.attack_batch,
        }
    elif spec.method == "lavan":
        found["steps"] = budget.lavan_steps
    elif spec.method == "patch-rs":
        found |= {"queries": budget.queries, "attack_batch": budget.attack_batch}
    return found


def _passes(filters: Filters, key: str, value: str) -> bool:
    return key not in filters or value in filters[key]


def _add(cell: Cell, ordered: dict[str, Cell]) -> None:
    for need in cell.needs:
        _add(need, ordered)
    ordered.setdefault(cell.name, cell)
