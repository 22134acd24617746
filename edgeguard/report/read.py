"""Reading `report.json`, and the executable definition of its schema."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeguard import files
from edgeguard.errors import InputError
from edgeguard.report import SCHEMA


@dataclass(frozen=True)
class Within:
    """Marks a number of a range, a whole one on request."""

    low: float
    high: float
    whole: bool = False


class Maybe:
    """Marks a part that may be null."""

    def __init__(self, shape: Any) -> None:
        self.shape = shape


class Missing(Maybe):
    """Marks a key that may be left out, or null."""


class Each:
    """Marks an object of any keys whose values are all alike."""

    def __init__(self, shape: Any) -> None:
        self.shape = shape


LARGEST = 2.0**63
"""No number of a report is beyond it, to either side."""
DEEPEST = 32
"""Objects and lists within each other."""
_SHARE, _CHANGE, _COUNT = Within(0, 1), Within(-1, 1), Within(0, LARGEST, whole=True)
_INTERVAL, _CHANGES = [_SHARE], [_CHANGE]
_OPTIONAL_TEXT = Maybe(str)
_NAMED = {"class": int, "name": str}
_ACCURACY = {"accuracy": _SHARE, "n": _COUNT, "ci95": _INTERVAL}
_RATE = {"asr": _SHARE, "ci95": _INTERVAL, "n": _COUNT}
_FLIPS = {"both": _COUNT, "engine_only": _COUNT, "twin_only": _COUNT, "neither": _COUNT}
_SURVIVAL = {
    "delta_asr": _CHANGE, "ci95": _CHANGES, "mcnemar_p": _SHARE, "verdict": str, "margin": _SHARE, "n": _COUNT,
    "bit_identical": bool, "flips": _FLIPS, "member": Missing(str),
}  # fmt: skip
_ATTACK = {
    "name": str, "access": str, "scope": ("universal", "per-image"), "steps": Maybe(_COUNT), "patch_size": _COUNT,
    "placement": str, "seen": Maybe(bool), **_RATE, "robust_accuracy": _SHARE, "robust_ci95": _INTERVAL,
    "robust_n": _COUNT, "twin_asr": Maybe(_SHARE), "queries": _COUNT, "source": _OPTIONAL_TEXT,
    "last_restart": Missing(_COUNT),
    "target": Missing(_COUNT), "stride": Missing(_COUNT), "places": _COUNT, "patch": Maybe(_COUNT),
    "survival": Maybe(_SURVIVAL), "members": Missing(Each(Maybe(_SHARE))),
}  # fmt: skip
_POOL = {"widths": [str], "probabilities": [_SHARE], "seed": Maybe(_COUNT)}
_REMOTE = {"url": str, "server": str, "platform": str, "claims": dict, "twin": bool, "claims_twins_artifact": bool}
_ARTIFACT = {
    "name": str, "target": str, "width": str, "weight_bits": _COUNT, "activation_bits": _COUNT, "sha256": str,
    "files": Each(str), "integer_mac_coverage": Maybe(_SHARE), "pool": Missing(_POOL), "remote": Missing(_REMOTE),
}  # fmt: skip
_EXAMPLE = {
    "index": _COUNT, "height": _COUNT, "width": _COUNT, "pixels": str, "label": _NAMED, "clean": _NAMED,
    "engine": _NAMED, "twin": Maybe(_NAMED), "fooled": bool,
}  # fmt: skip
_RULE = {
    "rule": str, "limit": (int, float, bool), "figure": (int, float, str, type(None)), "ci95": Maybe(_INTERVAL),
    "passed": bool, "detail": str,
}  # fmt: skip
_STEPS = {"equal": _SHARE, "steps": Each(_COUNT)}
_DATA = {"name": str, "sha256": str, "n": _COUNT, "of": _COUNT}
_BUNDLE = {
    "sha256": str,
    "patches": [{"file": str, "attack": str, "access": str, "source": _OPTIONAL_TEXT, "sha256": str}],
}
_HEAT_MAP = {"patch": _COUNT, "stride": _COUNT, "rows": [_COUNT], "columns": [_COUNT], "asr": [[_SHARE]], "n": _COUNT}
_DIVERGENCE = {
    "n": _COUNT, "reason": _OPTIONAL_TEXT, "layers": [{"layer": str, "op": str, "clean": _STEPS, "patched": _STEPS}],
    "skipped": Missing([{"tensor": str, "reason": str}]),
}  # fmt: skip
_CLEAN = {
    "engine": _ACCURACY, "twin": Maybe(_ACCURACY), "agreement": Maybe(_SHARE), "bit_identical": Maybe(bool),
    "steps": Maybe(Each(_COUNT)),
}  # fmt: skip
SHAPE: dict[str, Any] = {
    "schema": str,
    "edgeguard": str,
    "status": {"complete": bool, "reason": _OPTIONAL_TEXT},
    "artifact": _ARTIFACT,
    "environment": {"versions": dict, "platform": str, "engine": dict, "threads": _COUNT, "seed": _COUNT, "command": [str]},
    "data": {**_DATA, "judged_sha256": Missing(str), "crafting": Maybe(_DATA)},
    "bundle": Missing(_BUNDLE),
    "options": dict,
    "definitions": Each(str),
    "clean": {**_CLEAN, "members": Missing(Each(_CLEAN))},
    "attacks": [_ATTACK],
    "aggregated": [
        {"name": str, "patch_size": _COUNT, "placement": str, **_RATE, "source": _OPTIONAL_TEXT, "surrogates": [str]}
    ],
    "skipped": Missing([{"attack": str, "reason": str}]),
    "seen_unseen": [{"split": str, "seen": Maybe(_RATE), "unseen": Maybe(_RATE)}],
    "survival": Maybe({**_SURVIVAL, "attack": _COUNT}),
    "trust": [{"check": str, "passed": Maybe(bool), "detail": str}],
    "heat_map": Maybe(_HEAT_MAP),
    "divergence": Maybe(_DIVERGENCE),
    "advice": [str],
    "timing": {"attacks": [Within(0, LARGEST)], "total": Within(0, LARGEST)},
    "gate": Maybe({"passed": bool, "rules": [_RULE]}),
    "patches": [{"height": _COUNT, "width": _COUNT, "pixels": str, "mask": str, "sha256": str}],
    "examples": {"attack": _COUNT, "images": [_EXAMPLE], "member": Missing(str)},
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
        got = document.get("schema") if isinstance(document, dict) else None
        named = f"its schema is {got!r:.60}" if isinstance(got, str) else "it names none"
        raise InputError(
            f"not a report of schema {SCHEMA!r}: {named}; use the edgeguard that wrote it, or verify again"
        )
    _check_values(document)
    check_shape(document, SHAPE, "report")
    _check_links(document)
    return document


def _check_links(document: dict[str, Any]) -> None:
    """What parts of the report say of each other."""
    if not document["attacks"]:
        raise InputError("the report holds no attack")
    attacks, patches, places = len(document["attacks"]), len(document["patches"]), document["heat_map"]
    links = [document["examples"]["attack"], *([document["survival"]["attack"]] if document["survival"] else [])]
    if any(link >= attacks for link in links):
        raise InputError("the report refers to an attack that it does not hold")
    numbers = [attack["patch"] for attack in document["attacks"] if attack["patch"] is not None]
    if any(number >= patches for number in [*numbers, *([places["patch"]] if places else [])]):
        raise InputError("an attack of the report refers to a patch that it does not hold")
    if len(document["timing"]["attacks"]) != attacks:
        raise InputError(f"the report holds {attacks} attacks, and times of {len(document['timing']['attacks'])}")
    pool = document["artifact"].get("pool")
    if pool and not len(pool["widths"]) == len(pool["probabilities"]) > 0:
        raise InputError("the pool of the report needs one probability for each of its widths")
    if places and not (
        places["rows"] and places["columns"] and places["n"] and len(places["asr"]) == len(places["rows"])
        and all(len(line) == len(places["columns"]) for line in places["asr"])
    ):  # fmt: skip
        raise InputError(
            "the heat map of the report needs one ASR for each of its rows and columns, and n of at least 1"
        )


def _check_values(document: Any) -> None:
    """Refuse, anywhere in the document, what no report holds and no page can show."""
    todo = [(document, 0)]
    while todo:
        value, depth = todo.pop()
        if depth > DEEPEST:
            raise InputError(f"the report is nested deeper than {DEEPEST} levels")
        if isinstance(value, dict):
            todo += [(part, depth + 1) for part in (*value.keys(), *value.values())]
        elif isinstance(value, list):
            todo += [(part, depth + 1) for part in value]
        elif isinstance(value, int | float) and not -LARGEST <= value <= LARGEST:  # false for NaN, too
            raise InputError(f"the report holds a number that is none of its figures: {_amount(value)}")
        elif isinstance(value, str) and not value.isascii() and any("\ud800" <= sign <= "\udfff" for sign in value):
            raise InputError("the report holds text that is not valid Unicode: half of a surrogate pair")


def check_shape(value: Any, shape: Any, where: str) -> None:
    """Raises InputError where a value is not of a shape as `SHAPE` writes them; where: its name in the message."""
    if isinstance(shape, Maybe):
        if value is not None:
            check_shape(value, (shape.shape, type(None)) if isinstance(shape.shape, type) else shape.shape, where)
    elif isinstance(shape, Within):
        _check_number(value, shape, where)
    elif isinstance(shape, dict | Each):
        _check_object(value, shape, where)
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise InputError(f"{where} must be a list, got {_kind(value)}")
        for index, item in enumerate(value):
            check_shape(item, shape[0], f"{where}[{index}]")
        if (shape is _INTERVAL or shape is _CHANGES) and (len(value) != 2 or value != sorted(value)):
            raise InputError(f"{where} must be an interval of two numbers, the lower first, got {value!r:.60}")
    elif isinstance(shape, tuple) and isinstance(shape[0], str):
        if value not in shape:
            raise InputError(f"{where} must be {' or '.join(shape)}, got {value!r:.60}")
    else:
        kinds = shape if isinstance(shape, tuple) else (shape,)
        if type(value) not in kinds:
            raise InputError(f"{where} must be {' or '.join(map(_name, kinds))}, got {_kind(value)}")


def _check_object(value: Any, shape: Any, where: str) -> None:
    if not isinstance(value, dict):
        raise InputError(f"{where} must be an object, got {_kind(value)}")
    for key, part in shape.items() if isinstance(shape, dict) else dict.fromkeys(value, shape.shape).items():
        name = f"{where}.{key:.60}"
        if key in value:
            check_shape(value[key], part, name)
        elif not isinstance(part, Missing):
            raise InputError(f"{name} is missing")


def _amount(value: int | float) -> str:
    """A number in few digits; of an integer that may be beyond every float its size."""
    return f"{value:g}" if isinstance(value, float) or abs(value) <= LARGEST else f"one of {value.bit_length()} bits"


def _check_number(value: Any, shape: Within, where: str) -> None:
    kinds = (int,) if shape.whole else (int, float)
    if type(value) not in kinds:
        raise InputError(f"{where} must be {' or '.join(map(_name, kinds))}, got {_kind(value)}")
    if not shape.low <= value <= shape.high:
        raise InputError(f"{where} must be from {shape.low:g} to {shape.high:g}, got {_amount(value)}")


def _kind(value: Any) -> str:
    return _name(type(value))


def _name(kind: type) -> str:
    return "null" if kind is type(None) else kind.__name__
