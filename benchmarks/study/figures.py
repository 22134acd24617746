"""The study's figures, from its JSON files alone: pooled over seeds, compared in pairs, held against the goals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeguard import files
from edgeguard.errors import InputError
from edgeguard.statistics import paired_difference, wilson
from study.cells import read_document

SCHEMA, INDEX = "edgeguard.study/1", "index.json"


@dataclass(frozen=True)
class Share:
    """A share pooled over seeds. seeds: the share of each; judged: images of each seed, before those that do not count."""

    successes: int
    n: int
    seeds: tuple[float, ...]
    judged: int

    @property
    def value(self) -> float:
        return self.successes / self.n

    @property
    def ci95(self) -> tuple[float, float]:
        return wilson(self.successes, self.n)


@dataclass(frozen=True)
class Difference:
    """The first share minus the second on images that count for both engines, with its 95 % interval."""

    value: float
    ci95: tuple[float, float]
    n: int


@dataclass(frozen=True)
class Study:
    """An index and its finished cells, by kind, defence, width and attack, a document for each seed."""

    grid: Mapping[str, Any]
    cells: Mapping[tuple[str, str, str, str], Sequence[Mapping[str, Any]]]
    missing: tuple[str, ...]

    @staticmethod
    def load(folder: Path) -> Study:
        """Read a study's folder.

        Raises:
            InputError: no index, an unknown schema, or a broken cell.
        """
        index = files.read_json(folder / INDEX)
        if not isinstance(index, dict) or index.get("schema") != SCHEMA:
            raise InputError(f"{folder / INDEX} is not of schema {SCHEMA!r}; make it with benchmarks/study.py")
        found: dict[tuple[str, str, str, str], list[Mapping[str, Any]]] = {}
        for entry in index["cells"]:
            if entry["file"] is not None:
                document = read_document(folder / entry["file"])
                key = (document["kind"], document["defence"], document["width"], document["attack"])
                found.setdefault(key, []).append(document)
        return Study(index["grid"], found, tuple(entry["name"] for entry in index["cells"] if entry["file"] is None))

    @property
    def defences(self) -> list[Mapping[str, Any]]:
        return list(self.grid["defences"])

    @property
    def ablations(self) -> list[Mapping[str, Any]]:
        return list(self.grid["ablations"])

    @property
    def widths(self) -> list[str]:
        return list(self.grid["widths"])

    @property
    def attacks(self) -> list[Mapping[str, Any]]:
        return list(self.grid["attacks"])

    def documents(self, kind: str, defence: str, width: str | None = None, attack: str = "") -> list[Mapping[str, Any]]:
        """Finished cells; width None: of all widths."""
        if width is not None:
            return list(self.cells.get((kind, defence, width, attack), ()))
        return [one for key, documents in self.cells.items() if key[:2] == (kind, defence) for one in documents]

    def asr(self, defence: str, width: str, attack: str) -> Share | None:
        """Attack success rate, aggregated over sources within each seed and pooled over seeds."""
        results = [one["result"] for one in self.documents("attack", defence, width, attack)]
        return _pooled(results, [result["judged"] for result in results])

    def accuracy(self, defence: str, width: str) -> Share | None:
        """Clean accuracy on all test images, pooled over seeds."""
        results = [one["result"] for one in self.documents("accuracy", defence, width)]
        return _pooled(results, [result["n"] for result in results])

    def certified(self, defence: str, width: str, what: str = "certified") -> Share | None:
        """Share of judged images: certified, defended or clean."""
        found = [one["result"] for one in self.documents("certificate", defence, width)]
        counts = [{"successes": result[what]["correct"], "n": result["n"]} for result in found]
        return _pooled(counts, [result["n"] for result in found])

    def gap(self, first: str, second: str, width: str, attack: str) -> float | None:
        """ASR of the first defence minus that of the second, each of the images that count for it."""
        one, other = self.asr(first, width, attack), self.asr(second, width, attack)
        return None if one is None or other is None else one.value - other.value

    def difference(self, first: str, second: str, width: str, attack: str) -> Difference | None:
        """ASR of the first defence minus that of the second, seed by seed on the same images."""
        pairs = {
            name: {one["seed"]: one["result"] for one in self.documents("attack", name, width, attack)}
            for name in (first, second)
        }
        counts = np.zeros(4, np.int64)
        for seed in sorted(pairs[first].keys() & pairs[second].keys()):
            one, other = pairs[first][seed], pairs[second][seed]
            counts += _discordant(one, other)
        if not counts.sum():
            return None
        both, only_first, only_second, neither = (int(count) for count in counts)
        n = int(counts.sum())
        return Difference((only_first - only_second) / n, paired_difference(both, only_first, only_second, neither), n)


def _pooled(results: Sequence[Mapping[str, Any]], judged: Sequence[int]) -> Share | None:
    """Counts added over seeds; None where no seed is measured."""
    if not results:
        return None
    successes, n = sum(one["successes"] for one in results), sum(one["n"] for one in results)
    return Share(successes, n, tuple(one["successes"] / one["n"] for one in results), min(judged))


def _discordant(one: Mapping[str, Any], other: Mapping[str, Any]) -> NDArray[np.int64]:
    """(4,): both, only the first, only the second, neither is fooled, of the images judged that count for both.

    Where more images were judged of one, those of the other are its first.
    """
    common = min(one["judged"], other["judged"])
    counting = _flags(one, "eligible")[:common] & _flags(other, "eligible")[:common]
    first, second = _flags(one, "fooled")[:common][counting], _flags(other, "fooled")[:common][counting]
    return np.array(
        [(first & second).sum(), (first & ~second).sum(), (~first & second).sum(), (~first & ~second).sum()], np.int64
    )


def _flags(result: Mapping[str, Any], key: str) -> NDArray[np.bool_]:
    """(judged,) bool, from hexadecimal bits."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(result[key]), np.uint8))
    return bits[: result["judged"]].astype(bool)
