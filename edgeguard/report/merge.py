"""Several reports on one model, one set of images and one set of patches as one, such as a workstation's and a device's.

The model is one artifact, or the integer graph that artifacts of several targets share.

Nothing is averaged: every rate stays a cell of its own, with its count, its interval, and the report that it is from, and so
the engine, the machine and the access. Only cells of the same patches at the same places are put side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import edgeguard
from edgeguard.errors import InputError
from edgeguard.report.compare import Entry, entries, same_images
from edgeguard.report.figures import Report, headline
from edgeguard.report.identity import UNKNOWN, Executed

SCHEMA = "edgeguard.merged/1"
ARTIFACT = ("width", "weight_bits", "activation_bits")
SAME_DEFINITIONS = ("asr", "robust_accuracy", "ci95")
MEASURE = ("attack", "scope", "patch_size", "placement", "stride", "places", "target", "patch_sha256")
"""What two cells must share to be the same measure."""
KEPT = (
    "scope", "access", "patch_size", "placement", "stride", "places", "target", "asr", "ci95", "n", "robust_accuracy",
    "robust_ci95", "robust_n", "twin_asr",
)  # fmt: skip


def merge(reports: Sequence[Report]) -> dict[str, Any]:
    """The merged document.

    Returns: `artifact`, the widths and the SHA-256 of the integer graph; `sources`, what each report is of; `cells`, every rate
    with the letter of its source; `side_by_side`, numbers of cells that are the same measure on several engines; `highest`, the
    number of the cell with the highest ASR.

    Raises:
        InputError: fewer than two or more than 26 reports, or reports of different models, data, definitions or patches.
    """
    found = entries(reports)
    executed = [Executed.of(one.report["artifact"]) for one in found]
    _check_models(found, executed)
    for other in found[1:]:
        _check_same(found[0], other)
    _check_patches(found)
    cells = [cell for one in found for cell in _cells(one)]
    artifact, data = found[0].report["artifact"], found[0].report["data"]
    graph = next((one.graph for one in executed if one.graph != UNKNOWN), UNKNOWN)
    definitions: dict[str, list[dict[str, Any]]] = {}
    for one in found:
        for name, words in one.report["definitions"].items():
            kept = next((known for known in definitions.setdefault(name, []) if known["words"] == words), None)
            if kept is None:
                definitions[name].append({"words": words, "sources": [one.letter]})
            else:
                kept["sources"].append(one.letter)
    return {
        "schema": SCHEMA,
        "edgeguard": edgeguard.__version__,
        "artifact": {key: artifact[key] for key in ARTIFACT} | {"graph_sha256": graph},
        "data": {key: data[key] for key in ("name", "sha256", "n", "of")},
        "definitions": definitions,
        "sources": [_source(one) for one in found],
        "cells": cells,
        "side_by_side": _side_by_side(cells),
        "highest": max(range(len(cells)), key=lambda number: float(cells[number]["asr"])),
    }


def _check_models(found: Sequence[Entry], executed: Sequence[Executed]) -> None:
    """Refuse what is not of one model; two reports can be joined by a third, of which more is known."""
    for one, what in zip(found, executed, strict=True):
        if what.artifact == UNKNOWN:
            raise InputError(f"report {one.letter} is of a server that does not say which artifact it executes; "
                             "verify it with --twin")  # fmt: skip
    joined, left = [executed[0]], list(zip(found[1:], executed[1:], strict=True))
    while near := [pair for pair in left if any(pair[1].is_model(one) for one in joined)]:
        joined += [what for _, what in near]
        left = [pair for pair in left if pair not in near]
    for other, what in left:
        names = [f"{one.report['artifact']['name']} of SHA-256 {digest[:12]}..."
                 for one, digest in ((other, what.artifact), (found[0], executed[0].artifact))]  # fmt: skip
        raise InputError(f"report {other.letter} and report {found[0].letter} are of different artifacts, and "
                         f"{what.why_not(executed[0])}: {' and '.join(names)}; compare them without --merge")  # fmt: skip


def _check_same(first: Entry, other: Entry) -> None:
    """Refuse what cannot stand in one report."""
    pair = f"report {other.letter} and report {first.letter}"
    if not same_images(first.report, other.report):
        raise InputError(f"{pair} were judged on different images; verify both with one bundle of `edgeguard attack`, "
                         "or with equal data, --limit and --seed")  # fmt: skip
    for name in SAME_DEFINITIONS:
        words = [entry.report["definitions"].get(name) for entry in (first, other)]
        if words[0] != words[1]:
            raise InputError(f"{pair} define {name} differently: {words[1]!r:.80} and {words[0]!r:.80}")


def _executes(report: Report) -> dict[str, str | None]:
    """What an engine executes, in words; SHA-256 of that artifact, and of the twin's where a server is compared with one."""
    artifact, remote = report["artifact"], report["artifact"].get("remote")
    if not remote:
        return {"executes": f"{artifact['name']}, {artifact['target']}", "artifact_sha256": artifact["sha256"], "twin_sha256": None}
    claims, twin = remote["claims"], artifact["sha256"] if remote["twin"] else None
    claimed = claims.get("artifact_sha256")
    if isinstance(claimed, str):
        words = f"{remote['url'].rpartition('/')[2]}, {claims.get('target', UNKNOWN)}, as the server says"
        return {"executes": words, "artifact_sha256": claimed, "twin_sha256": twin}
    words = f"a server that does not say what it executes, with the twin {artifact['name']}"
    return {"executes": words, "artifact_sha256": UNKNOWN, "twin_sha256": twin}


def _check_patches(found: Sequence[Entry]) -> None:
    """What one report replays, every other must hold, replayed or crafted."""
    for one in found:
        replayed = {cell["patch_sha256"] for cell in _cells(one) if cell["access"] == "replay"} | _of_bundle(one.report)
        for other in found:
            held = {block["sha256"] for block in other.report["patches"]} | _of_bundle(other.report)
            missing = sorted(replayed - held - {None})
            if missing:
                raise InputError(
                    f"report {one.letter} replays the patch of SHA-256 {missing[0][:12]}..., and report {other.letter} does not "
                    "hold it: they are of different patches; verify both with one bundle"
                )


def _of_bundle(report: Report) -> set[str]:
    return {one["sha256"] for one in (report.get("bundle") or {"patches": []})["patches"]}


def _source(one: Entry) -> dict[str, Any]:
    report, environment = one.report, one.report["environment"]
    engine, outcomes = environment["engine"], [check["passed"] for check in report["trust"]]
    remote = report["artifact"].get("remote")
    survival = report["survival"]
    return {
        "letter": one.letter,
        "engine": f"{engine.get('runtime', UNKNOWN)} {engine.get('version', '')}".strip(),
        "machine": f"the server {remote['url']}, asked from {environment['platform']}" if remote else environment["platform"],
        **_executes(report),
        "seed": environment["seed"],
        "twin": report["clean"]["twin"] is not None,
        "integer_mac_coverage": report["artifact"]["integer_mac_coverage"],
        "clean": {key: report["clean"]["engine"][key] for key in ("accuracy", "ci95", "n")},
        "survival": survival["verdict"] if survival else None,
        "trust": {"passed": outcomes.count(True), "failed": outcomes.count(False), "not_run": outcomes.count(None)},
        "verdict": dict(zip(("mood", "sentence"), headline(report), strict=True)),
        "complete": report["status"]["complete"],
        "reason": report["status"]["reason"],
        "skipped": [dict(one) for one in report.get("skipped") or []],
        "bundle": (report.get("bundle") or {}).get("sha256"),
        "edgeguard": report["edgeguard"],
    }


def _cells(one: Entry) -> list[dict[str, Any]]:
    """The rates of a report. crafted: the access and the source that a patch was crafted with, where that is known."""
    carried = {entry["file"]: entry for entry in (one.report.get("bundle") or {"patches": []})["patches"]}
    found = []
    for row in one.report["attacks"]:
        entry = carried.get(row["source"]) if row["access"] == "replay" and row["name"] != "replay" else None
        crafted = None
        if entry is not None:
            crafted = {"access": entry["access"], "source": entry["source"]}
        elif row["access"] != "replay":
            crafted = {"access": row["access"], "source": row["source"]}
        digest = one.report["patches"][row["patch"]]["sha256"] if row["patch"] is not None else None
        found.append({
            "source": one.letter, "attack": row["name"], "file": row["source"] if row["access"] == "replay" else None,
            "crafted": crafted, "patch_sha256": entry["sha256"] if entry is not None else digest,
            **{key: row.get(key) for key in KEPT},
        })  # fmt: skip
    return found


def _side_by_side(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Cells of several reports that are one measure: the same known patches, placed alike, on the same images.

    equal: whether all of them count the same images and the same successes.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for number, cell in enumerate(cells):
        if cell["patch_sha256"] is not None:
            attack = None if cell["scope"] == "universal" else cell["attack"]  # a patch is the same whatever a file is called
            key = (attack, *(cell[name] for name in MEASURE[1:]))
            groups.setdefault(key, []).append(number)
    chosen = [numbers for numbers in groups.values() if len({cells[number]["source"] for number in numbers}) > 1]
    return [{"cells": numbers, "equal": len({(cells[n]["n"], round(cells[n]["asr"] * cells[n]["n"])) for n in numbers}) == 1}
            for numbers in chosen]  # fmt: skip
