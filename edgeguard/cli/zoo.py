"""`edgeguard harden --list`: the hardened models that come with the package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgeguard.cli.console import emit
from edgeguard.report.figures import attack_name, interval, of_images, percent
from edgeguard.zoo import PREFIX, ZooModel, models

SCHEMA = "edgeguard.zoo-list/1"
COLUMNS = ("model", "method", "data", "bits", "clean accuracy", "worst ASR", "of")
NONE = "This version of edgeguard comes without ready hardened models; make one with `edgeguard harden`."


def list_models(as_json: bool) -> None:
    """Print every ready model, its figures and the commands that use it; as JSON, the cards as they are.

    Raises:
        InputError: a card that cannot be read.
    """
    found = models()
    emit({"schema": SCHEMA, "models": [model.card for model in found]}, format_models(found), as_json)


def format_models(found: Sequence[ZooModel]) -> str:
    """A table with a row for each width of each model, and how to use one."""
    if not found:
        return NONE
    rows = [list(COLUMNS), *(row for model in found for row in _rows(model.card))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    notes = [f"{model.name}: {model.card['description']} {_credit(model.card)}" for model in found]
    notes += [note for model in found for note in _doubts(model.card)]
    first = found[0]
    bits = "4" if "4" in first.card["widths"] else first.card["widths"][0]
    use = [
        "The worst ASR is the highest of the attacks tried, with its 95 % interval; --json names every attack.",
        f"use: edgeguard export {PREFIX}{first.name} --bits {bits} --out {first.name}-{bits}",
        f"     edgeguard verify {first.name}-{bits} --data {first.card['data']['spec']} --budget quick",
    ]
    return "\n".join([*lines, "", *notes, "", *use])


def _rows(card: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for number, result in enumerate(card["results"]):
        shared = [card["name"], card["method"], card["data"]["spec"]] if number == 0 else ["", "", ""]
        clean, worst = result["clean"], max(result["attacks"], key=lambda attack: float(attack["asr"]), default=None)
        accuracy = of_images(clean) + ("" if clean["measured"] == "engine" else f", {clean['measured']}")
        rate, of = "not measured", ""
        if worst is not None:
            rate = f"{percent(worst['asr'])}, {interval(worst['ci95'])}"
            of = f"{attack_name(worst)}, n = {worst['n']}"
        rows.append([*shared, str(result["width"]), accuracy, rate, of])
    return rows


def _credit(card: Mapping[str, Any]) -> str:
    weights = card["weights"]
    return f"Starting weights: {weights['credit']} ({weights['licence']})." if weights["licence"] else "From scratch."


def _doubts(card: Mapping[str, Any]) -> list[str]:
    return [
        f"{card['name']} at {one['width']} bits: do not rely on its ASR, trust checks failed: {', '.join(one['failed_checks'])}"
        for one in card["results"]
        if one["failed_checks"]
    ]
