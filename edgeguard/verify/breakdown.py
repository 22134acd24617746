"""What the rows of a report add up to: the strongest of several surrogates, seen against unseen, places, advice."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from edgeguard.statistics import Z95
from edgeguard.verify.harness import Subject, judge_everywhere
from edgeguard.verify.judge import Findings
from edgeguard.verify.options import Progress

MAP_CELLS = 8
"""Places along each axis of the heat map, or one or two more."""
MAP_IMAGES = 100
VAGUE = 0.03
"""Half the width of an interval that is worth more images."""
LATE = 0.01
"""Share of the images that the last restart may fool alone before a search counts as unfinished."""
TRAINED_PLACEMENT, TRAINED_FAMILY = "random", "aqapa"
"""What a hardened model has seen: universal A-QAPA patches at random places."""
Row = Mapping[str, Any]


def aggregated(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The strongest transferred universal patch of each attack, size and placement: the maximum over surrogates."""
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["access"] == "transfer" and row["scope"] == "universal":
            groups.setdefault((row["name"], row["patch_size"], row["placement"]), []).append(row)
    found = []
    for (name, size, placement), members in groups.items():
        best = max(members, key=lambda row: float(row["asr"]))
        entry = {key: best[key] for key in ("asr", "ci95", "n", "source")}
        sources = [row["source"] for row in members]
        found.append({"name": name, "patch_size": size, "placement": placement, **entry, "surrogates": sources})
    return found


def seen_unseen(rows: list[dict[str, Any]], sizes: list[int] | None, widths: list[str] | None) -> list[dict[str, Any]]:
    """The strongest attack of those that the model was trained against, and of those that it was not, in four ways.

    sizes: sides of the patches it was trained against; None or empty where it was not trained against patches.
    widths: that it was trained at.
    """
    crafted = [row for row in rows if row["access"] not in ("none", "replay")]
    trained = bool(sizes)
    splits: dict[str, Callable[[Row], bool]] = {
        "size": lambda row: row["patch_size"] in (sizes or ()),
        "placement": lambda row: trained and row["placement"] == TRAINED_PLACEMENT,
        "family": lambda row: trained and row["name"] == TRAINED_FAMILY,
        "width": lambda row: trained and row["source"] in (widths or ()),
    }
    found = []
    for name, is_seen in splits.items():
        relevant = crafted
        if name == "width":  # only what is transferred comes from a width, and only some artifacts say which were trained
            relevant = [row for row in crafted if row["access"] == "transfer" and widths is not None]
        sides = {True: [row for row in relevant if is_seen(row)], False: [row for row in relevant if not is_seen(row)]}
        found.append({"split": name, "seen": _strongest(sides[True]), "unseen": _strongest(sides[False])})
    return found


def _strongest(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not rows:
        return None
    best = max(rows, key=lambda row: float(row["asr"]))
    return {key: best[key] for key in ("asr", "ci95", "n")}


def advice(report: Mapping[str, Any]) -> list[str]:
    """What more images or more effort would settle: rules of the gate that are open, a headline figure that is vague, and
    searches for single images that were still finding some when they ended."""
    found = [f"{rule['rule']}: {rule['detail']}" for rule in (report["gate"] or {"rules": []})["rules"]
             if not rule["passed"] and rule["ci95"] and rule["ci95"][0] <= rule["limit"] <= rule["ci95"][1]]  # fmt: skip
    strongest = max(report["attacks"], key=lambda row: float(row["asr"]))
    low, high = strongest["ci95"]
    if (high - low) / 2 > VAGUE:
        share = min(max(strongest["asr"], 0.05), 0.95)
        images = math.ceil(Z95**2 * share * (1 - share) / VAGUE**2 / 100) * 100
        found.append(
            f"the highest ASR, {strongest['asr']:.1%}, is known to {low:.1%} to {high:.1%} from {strongest['n']} images; about "
            f"{images:,} images that count would narrow it to {VAGUE:.0%} either way"
        )
    for row in report["attacks"]:
        late = row.get("last_restart")
        if row["access"] == "engine" and late and late >= LATE * row["n"]:  # by transfer, it is the surrogate that is searched
            found.append(
                f"{row['name']}, {row['patch_size']}x{row['patch_size']}, {row['access']} access: only the last restart "
                f"fooled {late} of {row['n']} images, so the search had not ended and {row['asr']:.1%} is a floor; try more "
                "--restarts and --steps, or --budget exhaustive"
            )
    return found


def heat_map(findings: Findings, subject: Subject, progress: Progress | None) -> dict[str, Any] | None:
    """ASR of the strongest universal patch at each place of a coarse grid; None where there is no such patch."""
    proposal = findings.strongest_universal()
    part = subject.first(MAP_IMAGES)
    if proposal is None or not part.eligible.any():
        return None
    patch = proposal.found.patch
    free = max(side - own for side, own in zip(subject.shape, patch.size, strict=True))
    stride = max(1, -(-free // MAP_CELLS))

    def tick(done: int, total: int) -> None:
        if progress is not None:
            progress("heat map of placements", done, total)

    grid, fooled = judge_everywhere(part, patch, stride, tick)
    rows, columns = sorted({int(row) for row, _ in grid}), sorted({int(column) for _, column in grid})
    shares = fooled.mean(1).reshape(len(rows), len(columns))
    number = next(row["patch"] for row, one in zip(findings.rows, findings.proposals, strict=True) if one is proposal)
    return {
        "patch": number, "stride": stride, "rows": rows, "columns": columns,
        "asr": [[float(share) for share in line] for line in shares], "n": int(fooled.shape[1]),
    }  # fmt: skip
