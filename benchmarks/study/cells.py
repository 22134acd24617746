"""Cells: what the study is made of, each cached as one JSON file that is named by the hash of all it depends on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeguard import files
from edgeguard.errors import InputError

SCHEMA = "edgeguard.study.cell/1"
VERSIONS = {"train": "1", "export": "1", "craft": "1", "attack": "1", "accuracy": "1", "certificate": "1"}
"""Raised when the code of a kind of cell changes what it computes; its cells are then computed again."""


@dataclass(frozen=True)
class Cell:
    """One piece of work.

    kind: of `VERSIONS`. defence, seed: whose. width: of the engine; of a training all its widths, joined by commas.
    attack: name in the grid, or method and size of a patch that is crafted. inputs: everything that the result depends on,
    JSON; None while a cell before it is not computed, so that they are not known. needs: cells that must be there first.
    """

    kind: str
    defence: str
    seed: int
    width: str
    attack: str = ""
    inputs: Any = None
    needs: tuple[Cell, ...] = ()

    @property
    def name(self) -> str:
        """Readable, and the same whatever the inputs are."""
        width = "-".join(self.width.split(","))
        return ".".join(part for part in (self.kind, self.defence, f"s{self.seed}", f"w{width}", self.attack) if part)

    @property
    def key(self) -> str | None:
        """Hexadecimal SHA-256 of kind, version and inputs; None while they are not known."""
        return None if self.inputs is None else digest(self.kind, self.inputs)


def digest(kind: str, inputs: Any) -> str:
    text = json.dumps([kind, VERSIONS[kind], inputs], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Cache:
    """Finished cells below a folder, written under a temporary name and renamed."""

    folder: Path

    def path(self, cell: Cell) -> Path | None:
        key = cell.key
        return None if key is None else self.folder / cell.kind / f"{cell.name}.{key[:16]}.json"

    def has(self, cell: Cell) -> bool:
        path = self.path(cell)
        return path is not None and path.is_file()

    def read(self, cell: Cell) -> dict[str, Any]:
        """The document of a finished cell.

        Raises:
            InputError: it is not finished, or its file is not this cell's.
        """
        path = self.path(cell)
        if path is None:
            raise InputError(f"{cell.name} is not computed yet; start the study again")
        document = read_document(path)
        if document["key"] != cell.key:
            raise InputError(f"{path} was computed from other inputs than its name says; delete it")
        return document

    def write(self, cell: Cell, result: Any, seconds: float, environment: dict[str, Any]) -> None:
        """seconds: of wall clock that the cell took."""
        path = self.path(cell)
        if path is None:
            raise InputError(f"{cell.name} has no inputs, so that its result cannot be kept")
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(path, {
            "schema": SCHEMA, "key": cell.key, "kind": cell.kind, "version": VERSIONS[cell.kind],
            "defence": cell.defence, "seed": cell.seed, "width": cell.width, "attack": cell.attack,
            "inputs": cell.inputs, "result": result, "seconds": seconds, "environment": environment,
        })  # fmt: skip

    def documents(self) -> list[dict[str, Any]]:
        """Every finished cell, also of other settings, by file name."""
        return [read_document(path) for path in sorted(self.folder.glob("*/*.json"))]


def read_document(path: Path) -> dict[str, Any]:
    """Read a cell's file.

    Raises:
        InputError: not a cell, or its inputs were changed.
    """
    document = files.read_json(path)
    keys = {"key", "kind", "defence", "seed", "width", "attack", "inputs", "result", "seconds", "environment"}
    if not isinstance(document, dict) or document.get("schema") != SCHEMA or not keys <= document.keys():
        raise InputError(f"{path} is not a cell of schema {SCHEMA!r}; delete it, and the study computes it again")
    kind, version = document["kind"], document.get("version")
    if kind in VERSIONS and version == VERSIONS[kind] and digest(kind, document["inputs"]) != document["key"]:
        raise InputError(f"{path}: its inputs were changed after it was computed; delete it")
    return document
