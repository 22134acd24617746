"""The study's tables in Markdown: a row for each defence, a column for each width."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from study.figures import Share, Study
from study.goals import goals
from study.grid import ABLATION_ATTACKS, ABLATION_WIDTHS, OURS

MARKS = {True: "reached", False: "**not reached**", None: "not measured"}
NONE = "-"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def measured(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table without the rows and columns in which nothing is measured; a sentence where nothing is at all."""
    rows = [row for row in rows if any(cell != NONE for cell in row[1:])]
    kept = [number for number in range(len(header)) if number == 0 or any(row[number] != NONE for row in rows)]
    if not rows:
        return "Not measured.\n"
    return table([header[number] for number in kept], [[row[number] for number in kept] for row in rows])


def shown(share: Share | None) -> str:
    """A share with interval and n, and its range over seeds where there are several."""
    if share is None:
        return NONE
    low, high = share.ci95
    text = f"{100 * share.value:.1f} [{100 * low:.1f}, {100 * high:.1f}], n = {share.n:,}"
    if len(share.seeds) > 1:
        text += f", seeds {100 * min(share.seeds):.1f} to {100 * max(share.seeds):.1f}"
    return text


def by_width(study: Study, value: Callable[[str, str], Share | None]) -> str:
    """value: from defence and width."""
    rows = [
        [str(one["title"]), *(shown(value(one["name"], width)) for width in study.widths)] for one in study.defences
    ]
    return measured(["defence", *(f"{width} bits" for width in study.widths)], rows)


def goals_table(study: Study) -> str:
    return table(["goal", "figure", ""], [[goal.text, goal.figure, MARKS[goal.reached]] for goal in goals(study)])


def attack_table(study: Study, attack: str) -> str:
    """ASR under one attack; under it, where it says more, the mean over corners and the strongest source."""
    return by_width(study, lambda defence, width: study.asr(defence, width, attack))


def sources(study: Study, attack: str) -> str:
    """From which width the strongest universal patch came, for each engine."""
    rows = []
    for one in study.defences:
        found = [[str(doc["result"]["source"]) for doc in study.documents("attack", one["name"], width, attack)]
                 for width in study.widths]  # fmt: skip
        rows.append([str(one["title"]), *(", ".join(cell) or NONE for cell in found)])
    return measured(["strongest patch from", *(f"{width} bits" for width in study.widths)], rows)


def price_table(study: Study) -> str:
    """What training cost: all runs of one seed added, where each width has its own."""
    rows, base = [], _seconds(study, "qat")
    for one in (*study.defences, *study.ablations):
        trainings = study.documents("train", one["name"])
        if not trainings:
            rows.append([str(one["title"]), *[NONE] * 6])
            continue
        seeds = len({doc["seed"] for doc in trainings})
        seconds = _seconds(study, one["name"])
        ratio = f"{seconds / base:.2f}" if base and seconds else NONE
        result, runs = trainings[0]["result"], len(trainings) / seeds
        passes = result["passes_per_batch"]
        rows.append([str(one["title"]), f"{runs:g}", f"{result['epochs']}", f"{passes:.2f}",
                     f"{passes * result['epochs'] * runs:.1f}", f"{seconds:,.0f}" if seconds else NONE, ratio])  # fmt: skip
    header = ["defence", "runs", "epochs", "passes over each batch", "passes over the data", "training, s", "over QAT"]
    return measured(header, rows)


def _seconds(study: Study, defence: str) -> float:
    """Training seconds of one seed, mean over seeds."""
    trainings = study.documents("train", defence)
    return float(sum(doc["seconds"] for doc in trainings)) / max(1, len({doc["seed"] for doc in trainings}))


def export_table(study: Study) -> str:
    """Integer coverage, equality with the reference, bytes, and the patch sizes each was trained against."""
    rows = []
    for one in study.defences:
        exports = study.documents("export", one["name"])
        if not exports:
            rows.append([str(one["title"]), *[NONE] * 4])
            continue
        results = [doc["result"] for doc in exports]
        sizes = sorted({size for result in results for size in result["patch_sizes"] or ()})
        same = all(result["identical_to_reference"] for result in results)
        rows.append([
            str(one["title"]), f"{min(result['integer_mac_coverage'] for result in results):.3f}",
            "yes" if same else "**no**",
            f"{min(r['file_bytes'] for r in results):,} to {max(r['file_bytes'] for r in results):,}",
            ", ".join(f"{size}x{size}" for size in sizes) or "none",
        ])  # fmt: skip
    return measured(["defence", "integer MACs", "identical to the reference", "file, bytes", "patches in training"], rows)


def difference_table(study: Study, attack: str) -> str:
    """ASR of QADT-R minus that of each other defence, in points, on the images that count for both."""
    rows = []
    for one in study.defences:
        if one["name"] == OURS:
            continue
        rows.append([f"against {one['title']}", *(_difference(study, OURS, one["name"], width, attack) for width in study.widths)])
    return measured(["QADT-R", *(f"{width} bits" for width in study.widths)], rows)


def _difference(study: Study, first: str, second: str, width: str, attack: str) -> str:
    found = study.difference(first, second, width, attack)
    if found is None:
        return NONE
    return f"{100 * found.value:+.1f} [{100 * found.ci95[0]:+.1f}, {100 * found.ci95[1]:+.1f}], n = {found.n:,}"


def part_table(study: Study, attack: str) -> str:
    """ASR of QADT-R without one part minus that of QADT-R, in points, on the images that count for both."""
    widths = [width for width in study.widths if width in ABLATION_WIDTHS]
    rows = [[str(one["title"]), *(_difference(study, one["name"], OURS, width, attack) for width in widths)]
            for one in study.ablations]  # fmt: skip
    return measured(["", *(f"{width} bits" for width in widths)], rows)


def ablation_table(study: Study) -> str:
    """QADT-R and QADT-R without one part: clean accuracy and ASR at the widths of the ablation."""
    named: dict[str, Mapping[str, Any]] = {str(one["name"]): one for one in study.attacks}
    attacks = [name for name in ABLATION_ATTACKS if name in named]
    widths = [width for width in study.widths if width in ABLATION_WIDTHS]
    header = [
        "",
        *(
            f"{what}, {width} bits"
            for what in ("clean", *(named[name]["title"] for name in attacks))
            for width in widths
        ),
    ]
    rows = []
    for one in (*(one for one in study.defences if one["name"] == OURS), *study.ablations):
        shares = [study.accuracy(one["name"], width) for width in widths]
        shares += [study.asr(one["name"], width, attack) for attack in attacks for width in widths]
        rows.append([str(one["title"]), *(NONE if share is None else f"{100 * share.value:.1f}" for share in shares)])
    return measured(header, rows)


def largest_interval(study: Study) -> float:
    """The widest half interval of the ablation's shares, in points; NaN where nothing is measured."""
    names = [OURS, *(str(one["name"]) for one in study.ablations)]
    shares = [study.asr(name, width, attack) for name in names for width in study.widths for attack in ABLATION_ATTACKS]
    halves = [(share.ci95[1] - share.ci95[0]) / 2 for share in shares if share is not None]
    return 100 * max(halves, default=float(np.nan))
