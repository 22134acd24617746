"""The study's plots, as SVG files that need no page around them."""

from __future__ import annotations

import re

from edgeguard.report.charts import bars, grid
from study.figures import Study
from study.grid import READY

COLOURS = {"ink": "#16191f", "soft": "#5a6372", "line": "#dfe3ea", "bar": "#c9502f", "heat": "#f2875b"}
HEADLINE = "per-image-8"


def plots(study: Study) -> dict[str, str]:
    """SVG text by file name; widths and attacks of which nothing is measured are left out."""
    found = {}
    for width in study.widths:
        drawn = _width(study, width)
        if drawn:
            found[f"study-asr-{width}.svg"] = drawn
    headline = _headline(study)
    if headline:
        found["study-per-image.svg"] = headline
    return found


def _width(study: Study, width: str) -> str:
    """Attacks by defences at one width."""
    names = [str(one["name"]) for one in study.defences]
    names = [name for name in names if any(study.asr(name, width, one["name"]) for one in study.attacks)]
    rows, shares = [], []
    for attack in study.attacks:
        measured = [study.asr(name, width, attack["name"]) for name in names]
        if any(share is not None for share in measured):
            rows.append(str(attack["name"]))
            shares.append([None if share is None else share.value for share in measured])
    if not rows:
        return ""
    return standalone(
        grid(rows, [label(name) for name in names], shares, f"attack success rates at {width} bits in percent, attacks by defences")
    )


def label(name: str) -> str:
    """A defence's name where there is little room."""
    return "ready" if name == READY else name


def _headline(study: Study) -> str:
    """A-QAPA per image 8x8 with intervals."""
    labels, shares, counts = [], [], []
    for one in study.defences:
        for width in study.widths:
            share = study.asr(one["name"], width, HEADLINE)
            if share is not None:
                labels.append(f"{label(one['name'])}, {width} bits")
                shares.append((share.value, *share.ci95))
                counts.append(share.n)
    return standalone(bars(labels, shares, counts, "attack success rate of A-QAPA per image, 8x8")) if labels else ""


def standalone(svg: str) -> str:
    """A chart of a report as a file: names the format, fixes the page's colours and paints the ground white."""
    text = re.sub(r"var\(--(\w+)\)", lambda found: COLOURS[found[1]], svg)
    head, rest = text.split(">", 1)
    names = ' xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" font-family="sans-serif"'
    return f'{head}{names}><rect width="100%" height="100%" fill="#ffffff"/>{rest}\n'
