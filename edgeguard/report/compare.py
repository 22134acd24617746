"""Several reports side by side: key figures, what changed against the first, and how attacks transfer between them.

A difference is given only for the same judged images (SHA-256 of the data, number, seed) and the same attack. A report
holds counts, not single images, so its interval is Newcombe's for independent samples: on the same images it is rather
too wide than too narrow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeguard.errors import InputError
from edgeguard.report.figures import Report, attack_name, headline, strongest, weakest_robustness
from edgeguard.statistics import difference

SCHEMA = "edgeguard.comparison/1"
MOST = 26
"""Reports at a time; each has a letter."""
IDENTITY = ("name", "access", "scope", "patch_size", "placement", "source", "target", "stride", "steps")
BETTER, WORSE, SAME = "better", "worse", "no clear difference"


@dataclass(frozen=True)
class Entry:
    """A report, and the letter it has in a comparison."""

    letter: str
    report: Report

    @property
    def label(self) -> str:
        return f"{self.letter}, {self.report['artifact']['width']} bit"


def entries(reports: Sequence[Report]) -> list[Entry]:
    """Letters for the reports, in their order.

    Raises:
        InputError: fewer than two, or more than there are letters.
    """
    if not 2 <= len(reports) <= MOST:
        raise InputError(f"a comparison is of 2 to {MOST} reports, got {len(reports)}")
    return [Entry(chr(ord("A") + number), report) for number, report in enumerate(reports)]


def compare(reports: Sequence[Report]) -> dict[str, Any]:
    """The comparison as a document.

    Returns: `reports`, the key figures of each; `changes`, of every later report against the first; `transfer`, for each
    kind of transferred patch and each target, the ASR by what it was crafted on (rows) and by report (columns).
    """
    found = entries(reports)
    return {
        "schema": SCHEMA,
        "reports": [_key_figures(entry) for entry in found],
        "changes": [_changes(found[0], entry) for entry in found[1:]],
        "transfer": _transfer(found),
    }


def _key_figures(entry: Entry) -> dict[str, Any]:
    report = entry.report
    artifact, attack, robust, survival = (
        report["artifact"],
        strongest(report),
        weakest_robustness(report),
        report["survival"],
    )
    outcomes = [check["passed"] for check in report["trust"]]
    return {
        "letter": entry.letter,
        **{key: artifact[key] for key in ("name", "target", "width", "sha256", "integer_mac_coverage")},
        "data_sha256": report["data"]["sha256"],
        "verdict": dict(zip(("mood", "sentence"), headline(report), strict=True)),
        "clean": {key: report["clean"]["engine"][key] for key in ("accuracy", "ci95", "n")},
        "strongest": {"attack": attack_name(attack), **{key: attack[key] for key in ("asr", "ci95", "n")}},
        "robust": {"attack": attack_name(robust), "accuracy": robust["robust_accuracy"], "ci95": robust["robust_ci95"],
                   "n": robust["robust_n"]},
        "survival": survival["verdict"] if survival else None,
        "trust": {"passed": outcomes.count(True), "failed": outcomes.count(False), "not_run": outcomes.count(None)},
        "gate": report["gate"]["passed"] if report["gate"] else None,
        "complete": report["status"]["complete"],
    }  # fmt: skip


def same_images(first: Report, second: Report) -> bool:
    """Whether two reports judged the same images; those that do not name them drew them from the data with the seed."""
    keys = ("sha256", "n", "of")
    data = all(first["data"][key] == second["data"][key] for key in keys)
    drawn = [report["data"].get("judged_sha256") for report in (first, second)]
    if None not in drawn:
        return data and drawn[0] == drawn[1]
    return data and first["environment"]["seed"] == second["environment"]["seed"]


def _changes(first: Entry, second: Entry) -> dict[str, Any]:
    before, after = first.report, second.report
    found: dict[str, Any] = {"from": first.letter, "to": second.letter, "reason": None, "figures": []}
    if not same_images(before, after):
        return {**found, "reason": "the two were judged on other images, so that a difference would say nothing"}
    one, two = (report["clean"]["engine"] for report in (before, after))
    figures = [{"figure": "clean accuracy", "same_patch": None,
                **_change(one["accuracy"], one["n"], two["accuracy"], two["n"], higher_is_better=True)}]  # fmt: skip
    rows = {_identity(row): row for row in before["attacks"]}
    for row in after["attacks"]:
        old = rows.get(_identity(row))
        if old is None or not (old["n"] and row["n"]):
            continue
        digests = [_digest(report, one) for report, one in ((before, old), (after, row))]
        same = None if None in digests else digests[0] == digests[1]
        source = f", crafted on {row['source']}" if row["source"] and row["access"] == "transfer" else ""
        figures.append({"figure": f"ASR, {attack_name(row)}{source}", "same_patch": same,
                        **_change(old["asr"], old["n"], row["asr"], row["n"], higher_is_better=False)})  # fmt: skip
    reason = None if len(figures) > 1 else "they share no attack of the same kind, size, placement, source and steps"
    return {**found, "reason": reason, "figures": figures}


def _identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    keys = [row.get(key) for key in IDENTITY]
    if row["access"] == "engine":
        keys[IDENTITY.index("source")] = None  # always the engine's own twin, whatever its width
    return tuple(keys)


def _digest(report: Report, row: Mapping[str, Any]) -> str | None:
    return None if row["patch"] is None else str(report["patches"][row["patch"]]["sha256"])


def _change(before: float, before_n: int, after: float, after_n: int, *, higher_is_better: bool) -> dict[str, Any]:
    if not (before_n and after_n):
        raise InputError("a report holds a rate of no images; it cannot be compared")
    low, high = difference(round(after * after_n), after_n, round(before * before_n), before_n)
    rise, fall = (BETTER, WORSE) if higher_is_better else (WORSE, BETTER)
    return {"before": before, "before_n": before_n, "after": after, "after_n": after_n, "difference": after - before,
            "ci95": [low, high], "verdict": rise if low > 0 else fall if high < 0 else SAME}  # fmt: skip


def _transfer(found: Sequence[Entry]) -> list[dict[str, Any]]:
    """One matrix per kind of patch and target; beside the surrogates, `this engine` is the attack on the engine itself."""
    kinds = sorted({_kind(row) for entry in found for row in entry.report["attacks"] if row["access"] == "transfer"})
    matrices = []
    for kind in kinds:
        for target in sorted({str(entry.report["artifact"]["target"]) for entry in found}):
            columns = [entry for entry in found if entry.report["artifact"]["target"] == target]
            cells = {(origin, entry.letter): {key: row[key] for key in ("asr", "ci95", "n")}
                     for entry in columns for origin, row in _origins(entry.report, kind)}  # fmt: skip
            origins = sorted({origin for origin, _ in cells}, key=lambda name: (name == "this engine", len(name), name))
            if not any(origin != "this engine" for origin in origins):
                continue
            name, size, placement = kind
            matrices.append({
                "name": name, "patch_size": size, "placement": placement, "target": target,
                "surrogates": origins, "reports": [entry.letter for entry in columns],
                "cells": [[cells.get((origin, entry.letter)) for entry in columns] for origin in origins],
            })  # fmt: skip
    return matrices


def _origins(report: Report, kind: tuple[str, int, str]) -> list[tuple[str, Mapping[str, Any]]]:
    """What patches of a kind were crafted on; of several from one surrogate the strongest."""
    rows = sorted((row for row in report["attacks"] if _kind(row) == kind), key=lambda row: float(row["asr"]))
    named = [("this engine" if row["access"] == "engine" else f"twin {row['source']}", row) for row in rows
             if row["access"] in ("transfer", "engine")]  # fmt: skip
    return list(dict(named).items())


def _kind(row: Mapping[str, Any]) -> tuple[str, int, str]:
    return row["name"], row["patch_size"], row["placement"]
