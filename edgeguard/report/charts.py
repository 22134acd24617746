"""Charts as inline SVG, drawn by matplotlib when one is asked for.

Text stays text in the page's own font, and colours are the page's CSS variables, so that light, dark and paper work:
a chart is drawn in colours that stand for them, which are replaced afterwards. Equal arguments give equal text.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from edgeguard.errors import require
from edgeguard.report.markup import printable, text

INK, SOFT, LINE, BAR, HEAT = "#010101", "#020202", "#030303", "#040404", "#050505"
VARIABLES = {INK: "ink", SOFT: "soft", LINE: "line", BAR: "bar", HEAT: "heat"}
SETTINGS = {
    "svg.fonttype": "none", "svg.hashsalt": "edgeguard", "text.parse_math": False, "font.size": 11, "text.color": INK,
    "axes.edgecolor": LINE, "axes.labelcolor": SOFT, "xtick.color": SOFT, "ytick.color": INK, "path.simplify": False,
}  # fmt: skip
WIDTH = 400
"""Of every chart, in its own units; a page scales it."""
LABEL, CHARACTER = 26, 5.9
"""Most characters of a label, and the width of one."""
MARGIN, ROW = 26, 24
SMALLEST, LARGEST = 14.0, 46.0
"""Sides of a cell; smaller ones hold no number."""
SLANT = math.radians(35)
"""Of titles of columns that are wider than their columns."""

Share = tuple[float, float, float]
"""A share and the two ends of its interval."""


def bars(labels: Sequence[str], shares: Sequence[Share], counts: Sequence[int], alt: str) -> str:
    """Horizontal bars from 0 to 100 % with their intervals."""
    names = [_short(label) for label in labels]
    left = _margin(names)
    height = MARGIN + ROW * len(names) + 6

    def draw(figure: Any) -> None:
        axes = figure.add_axes(
            (left / WIDTH, MARGIN / height, (WIDTH - left - 92) / WIDTH, (height - MARGIN - 6) / height)
        )
        for row, (share, low, high) in enumerate(shares):
            axes.barh(row, share, 0.46, color=BAR, linewidth=0, alpha=0.85)
            axes.plot([low, high], [row, row], color=INK, linewidth=1.5)
            for end in (low, high):
                axes.plot([end, end], [row - 0.16, row + 0.16], color=INK, linewidth=1.5)
            axes.text(1.03, row, f"{100 * share:.1f} % of {counts[row]}", va="center", color=INK)
        axes.set(xlim=(0, 1), ylim=(len(names) - 0.5, -0.5))
        axes.set_xticks([0, 0.5, 1], labels=["0", "50", "100 %"])
        axes.set_yticks(range(len(names)), labels=names)
        axes.xaxis.grid(True, color=LINE, linewidth=1)
        axes.set_axisbelow(True)
        _bare(axes)

    return _svg(draw, height, alt)


def grid(rows: Sequence[str], columns: Sequence[str], shares: Sequence[Sequence[float | None]], alt: str) -> str:
    """A matrix of shares, deeper in colour where they are higher, in percent; None leaves a cell empty."""
    names, titles = [_short(row) for row in rows], [_short(column) for column in columns]
    left, longest = _margin(names), CHARACTER * max(map(len, titles))
    side = min(LARGEST, (WIDTH - left - 8) / len(columns))
    every = max(1, round(SMALLEST / side + 0.49)) if longest < side * 3 else 1
    slanted = longest > side * every
    if slanted:
        side = min(LARGEST, (WIDTH - left - 8 - longest * math.cos(SLANT)) / (len(columns) - 0.5))
    top = MARGIN + (longest * math.sin(SLANT) if slanted else 0)
    height = top + side * len(names) + 4
    size = min(11.0, 0.36 * side)

    def draw(figure: Any) -> None:
        patches = require("matplotlib.patches", "report")
        axes = figure.add_axes((left / WIDTH, 4 / height, side * len(columns) / WIDTH, side * len(names) / height))
        for row, line in enumerate(shares):
            for column, share in enumerate(line):
                box = (column - 0.5, row - 0.5), 1, 1
                axes.add_patch(patches.Rectangle(*box, fill=False, edgecolor=LINE, linewidth=0.5))
                if share is None:
                    continue
                axes.add_patch(patches.Rectangle(*box, facecolor=HEAT, alpha=round(share, 3), linewidth=0))
                if side >= SMALLEST:
                    axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=size, color=INK)
        axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(names) - 0.5, -0.5))
        turned = {"rotation": math.degrees(SLANT), "ha": "left", "rotation_mode": "anchor"} if slanted else {}
        axes.set_xticks(range(0, len(columns), every), labels=titles[::every], **turned)
        axes.set_yticks(range(0, len(names), every), labels=names[::every])
        axes.xaxis.tick_top()
        _bare(axes)

    return _svg(draw, height, alt)


def _short(label: str) -> str:
    label = " ".join(printable(label).split())
    return label if len(label) <= LABEL else label[: LABEL - 1] + "…"


def _margin(names: Sequence[str]) -> float:
    return 14 + CHARACTER * max(map(len, names))


def _bare(axes: Any) -> None:
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, pad=5)


def _svg(draw: Callable[[Any], None], height: float, alt: str) -> str:
    """One drawing as an element of a page.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    require("matplotlib", "report")
    figures, style = require("matplotlib.figure", "report"), require("matplotlib.style", "report")
    buffer = io.StringIO()
    with warnings.catch_warnings(), style.context(["default", SETTINGS]):
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure = figures.Figure(figsize=(WIDTH / 72, height / 72), facecolor="none")
        draw(figure)
        for artist in figure.findobj():
            artist.set_clip_on(False)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _inline(buffer.getvalue(), alt)


def _inline(svg: str, alt: str) -> str:
    """What matplotlib wrote, without what would leak into the page around it: style, ids, names, fonts, colours."""
    start = svg.index("<svg")
    body = svg[svg.index(">", start) + 1 : svg.rindex("</svg>")]
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, count=1, flags=re.DOTALL)
    body = re.sub(r'<(g|path|text|use|rect) id="[^"]*"', r"<\1", body)
    body = re.sub(r"font: (?:[a-z0-9]+ )*?([\d.]+px) [^;\"]*", r"font-size: \1", body)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = re.sub(r"(fill|stroke): (#0\d0\d0\d)", lambda found: f"{found[1]}: {_variable(found[2])}", body)
    body = re.sub(r"\s*\n\s*", " ", body)
    box = re.search(r'viewBox="[\d. ]+"', svg[start:])
    return f'<svg class="chart" role="img" aria-label="{text(alt)}" {box[0] if box else ""}>{body.strip()}</svg>'


def _variable(colour: str) -> str:
    return f"var(--{VARIABLES[colour]})" if colour in VARIABLES else colour
