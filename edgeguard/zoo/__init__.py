"""Hardened models that come with the package: `zoo:NAME` wherever a command takes a run.

Each is a folder below `models/` as `Run.load` reads it, its checkpoint without the state of the training, and beside it
`card.json`: what the model is, how it was made, what it withstands, and the SHA-256 of every file. The command
`benchmarks/make_zoo.py` writes such a folder. Neither torch nor safetensors is needed to read a card.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeguard import files
from edgeguard.errors import InputError

SCHEMA = "edgeguard.zoo/1"
CARD = "card.json"
PREFIX = "zoo:"
MODELS = Path(__file__).resolve().parent / "models"
REQUIRED = {
    "schema": str, "name": str, "description": str, "model": dict, "data": dict, "method": str, "widths": list,
    "results": list, "weights": dict, "training": dict, "source": dict, "files": dict,
}  # fmt: skip
RUN_FILES = ("config.json", "checkpoint.safetensors", "metrics.jsonl")


@dataclass(frozen=True)
class ZooModel:
    """A ready model. card: the parsed `card.json`; its keys are those of `REQUIRED`.

    The card's `results` hold one entry for each width: `{"width", "clean": {"accuracy", "n", "ci95", "measured"},
    "attacks": [{"name", "access", "scope", "patch_size", "placement", "asr", "ci95", "n"}], "failed_checks"}`. measured
    says where the accuracy is from: `engine`, a report on the deployed engine, or `simulation`, the run's own metrics.
    attacks are of such reports; failed_checks names the trust checks that failed in them.
    """

    path: Path
    card: dict[str, Any]

    @staticmethod
    def load(path: Path) -> ZooModel:
        """Read the card of a ready model.

        Raises:
            InputError: no card, another schema, or a part of it is missing or of the wrong type.
        """
        source = path / CARD
        card = files.read_json(source)
        if not isinstance(card, dict) or card.get("schema") != SCHEMA:
            raise InputError(f"{source} is not of schema {SCHEMA!r}; {_AGAIN}")
        for key, kind in REQUIRED.items():
            if type(card.get(key)) is not kind:
                raise InputError(f"{source}: {key!r} is missing or not a {kind.__name__}; {_AGAIN}")
        if card["name"] != path.name:
            raise InputError(f"{source} describes {card['name']!r}, but its folder is {path.name!r}; {_AGAIN}")
        return ZooModel(path, card)

    @property
    def name(self) -> str:
        return str(self.card["name"])

    def check(self) -> None:
        """Hold every file against the card's SHA-256.

        Raises:
            InputError: a file is missing from the card or the folder, or was changed.
        """
        hashes = self.card["files"]
        absent = [name for name in RUN_FILES if name not in hashes]
        if absent:
            raise InputError(f"{self.path / CARD} has no SHA-256 of {absent[0]}; {_AGAIN}")
        for name, digest in hashes.items():
            file = self.path / name
            if not files.has_plain_file(self.path, name):
                raise InputError(f"{self.path}: {name!r:.80} is missing or not a file of this folder; {_AGAIN}")
            if files.sha256(file) != digest:
                raise InputError(f"{file} was changed: its SHA-256 is not the one in {CARD}; {_AGAIN}")


_AGAIN = "install edgeguard again"


def names() -> tuple[str, ...]:
    """The ready models of this installation, sorted; empty where it has none."""
    return tuple(sorted(path.parent.name for path in MODELS.glob(f"*/{CARD}")))


def models() -> tuple[ZooModel, ...]:
    """The ready models with their cards, in the order of their names.

    Raises:
        InputError: a card that cannot be read.
    """
    return tuple(ZooModel.load(MODELS / name) for name in names())


def resolve(spec: str) -> Path:
    """The folder of a run: of the ready model NAME for `zoo:NAME`, whose files are checked; otherwise the path itself.

    Raises:
        InputError: no ready model has that name (which there are), or one of its files is missing or was changed.
    """
    if not spec.startswith(PREFIX):
        return Path(spec)
    name, known = spec.removeprefix(PREFIX), names()
    if name not in known:
        listed = f"expected one of {', '.join(known)}" if known else "this version of edgeguard comes without any"
        raise InputError(f"there is no ready model {name!r:.80}; {listed}; `edgeguard harden --list` describes them")
    model = ZooModel.load(MODELS / name)
    model.check()
    return model.path
