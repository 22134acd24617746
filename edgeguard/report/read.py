"""Reading `report.json`, and the executable definition of its schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeguard import files
from edgeguard.errors import InputError
from edgeguard.report import SCHEMA

Number = (int, float)
_OPTIONAL_TEXT = (str, type(None))
_OPTIONAL_NUMBER = (int, float, type(None))
_INTERVAL = [Number]
_NAMED = {"class": int, "name": str}
_ACCURACY = {"accuracy": Number, "n": int, "ci95": _INTERVAL}
_FLIPS = {"both": int, "engine_only": int, "twin_only": int, "neither": int}


class Maybe:
    """Marks a part that may be null."""

    def __init__(self, shape: Any) -> None:
        self.shape = shape


_SURVIVAL = {
    "delta_asr": Number, "ci95": _INTERVAL, "mcnemar_p": Number, "verdict": str, "margin": Number, "n": int,
    "bit_identical": bool, "flips": _FLIPS,
}  # fmt: skip
_ATTACK = {
    "name": str, "access": str, "patch_size": int, "placement": str, "seen": (bool, type(None)), "asr": Number,
    "ci95": _INTERVAL, "robust_accuracy": Number, "robust_ci95": _INTERVAL, "n": int, "twin_asr": _OPTIONAL_NUMBER,
    "queries": int, "source": _OPTIONAL_TEXT, "places": int, "patch": int, "survival": Maybe(_SURVIVAL),
}  # fmt: skip
_ARTIFACT = {
    "name": str, "target": str, "width": str, "weight_bits": int, "activation_bits": int, "sha256": str, "files": dict,
    "integer_mac_coverage": _OPTIONAL_NUMBER,
}  # fmt: skip
_EXAMPLE = {
    "index": int, "height": int, "width": int, "pixels": str, "label": _NAMED, "clean": _NAMED, "engine": _NAMED,
    "twin": Maybe(_NAMED), "fooled": bool,
}  # fmt: skip
_RULE = {
    "rule": str, "limit": (int, float, bool), "figure": (int, float, str, type(None)), "ci95": Maybe(_INTERVAL),
    "passed": bool, "detail": str,
}  # fmt: skip
_DATA = {"name": str, "sha256": str, "n": int, "of": int}
SHAPE: dict[str, Any] = {
    "schema": str,
    "edgeguard": str,
    "artifact": _ARTIFACT,
    "environment": {"versions": dict, "platform": str, "engine": dict, "threads": int, "seed": int, "command": [str]},
    "data": {**_DATA, "crafting": Maybe(_DATA)},
    "options": dict,
    "definitions": dict,
    "clean": {
        "engine": _ACCURACY, "twin": Maybe(_ACCURACY), "agreement": _OPTIONAL_NUMBER,
        "bit_identical": (bool, type(None)), "steps": (dict, type(None)),
    },
    "attacks": [_ATTACK],
    "aggregated": [{"patch_size": int, "placement": str, "asr": Number, "source": _OPTIONAL_TEXT, "surrogates": list}],
    "survival": Maybe({**_SURVIVAL, "attack": int}),
    "trust": [{"check": str, "passed": (bool, type(None)), "detail": str}],
    "gate": Maybe({"passed": bool, "rules": [_RULE]}),
    "patches": [{"height": int, "width": int, "pixels": str, "mask": str, "sha256": str}],
    "examples": {"attack": int, "images": [_EXAMPLE]},
}  # fmt: skip


def read_report(path: Path) -> dict[str, Any]:
    """Read and check a report.

    Raises:
        InputError: missing, not JSON, of another schema, or a part of it is missing or of the wrong type.
    """
    try:
        return check_report(files.read_json(path))
    except InputError as exc:
        message = str(exc)
        raise InputError(message if str(path) in message else f"{path}: {message}") from exc


def check_report(document: Any) -> dict[str, Any]:
    """The document itself, if it is a report.

    Raises:
        InputError: naming the first part that is wrong.
    """
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise InputError(f"not a report of schema {SCHEMA!r}")
    _check(document, SHAPE, "report")
    if not document["attacks"]:
        raise InputError("the report holds no attack")
    attacks, patches = len(document["attacks"]), len(document["patches"])
    links = [document["examples"]["attack"], *([document["survival"]["attack"]] if document["survival"] else [])]
    if any(not 0 <= link < attacks for link in links):
        raise InputError("the report refers to an attack that it does not hold")
    if any(not 0 <= attack["patch"] < patches for attack in document["attacks"]):
        raise InputError("an attack of the report refers to a patch that it does not hold")
    return document


def _check(value: Any, shape: Any, where: str) -> None:
    if isinstance(shape, Maybe):
        if value is not None:
            _check(value, shape.shape, where)
    elif isinstance(shape, dict):
        if not isinstance(value, dict):
            raise InputError(f"{where} must be an object, got {type(value).__name__}")
        for key, part in shape.items():
            if key not in value:
                raise InputError(f"{where}.{key} is missing")
            _check(value[key], part, f"{where}.{key}")
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise InputError(f"{where} must be a list, got {type(value).__name__}")
        if shape is _INTERVAL and len(value) != 2:
            raise InputError(f"{where} must be an interval of two numbers, got {len(value)}")
        for index, item in enumerate(value):
            _check(item, shape[0], f"{where}[{index}]")
    else:
        kinds = shape if isinstance(shape, tuple) else (shape,)
        if type(value) not in kinds:
            names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise InputError(f"{where} must be {names}, got {type(value).__name__}")
