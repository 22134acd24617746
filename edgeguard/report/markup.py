"""What the sections of a page are made of. Every function returns HTML in which all text of a report is escaped."""

from __future__ import annotations

import base64
import binascii
import html
import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from edgeguard.errors import InputError
from edgeguard.report.figures import interval, percent
from edgeguard.report.png import encode

MARKS = {True: ("good", "✓ passed"), False: ("bad", "✗ failed"), None: ("unknown", "○ not run")}
MAX_SIDE = 4096
CONTROLS = dict.fromkeys((*range(9), 11, 12, *range(14, 32), 127, 0xFFFE, 0xFFFF), "\ufffd")
"""Characters that neither HTML nor XML 1.0 may hold."""


def printable(value: object) -> str:
    """Any value as text without control characters."""
    return str(value).translate(CONTROLS)


def text(value: object) -> str:
    """Any value as escaped text."""
    return html.escape(printable(value), quote=True)


def mark(passed: bool | None) -> str:
    """Passed, failed or not run: a sign, a word and a colour."""
    mood, words = MARKS[passed]
    return f'<span class="mark {mood}">{words}</span>'


def note(sentence: object) -> str:
    """A sentence of explanation."""
    return f'<p class="note">{text(sentence)}</p>'


def card(*parts: str) -> str:
    """A box."""
    return f'<div class="card">{"".join(parts)}</div>'


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    """Names and values side by side."""
    return f'<dl class="facts">{"".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in pairs)}</dl>'


def points(sentences: Iterable[object]) -> str:
    """A list of sentences."""
    return f'<ul class="points">{"".join(f"<li>{text(sentence)}</li>" for sentence in sentences)}</ul>'


def checks(entries: Iterable[tuple[bool | None, str, object]]) -> str:
    """A list of outcomes. Each: passed, what (HTML), and the detail."""
    items = "".join(
        f"<li>{mark(passed)}<span>{what}<small>{text(detail)}</small></span></li>" for passed, what, detail in entries
    )
    return f'<ul class="checks">{items}</ul>'


def table(head: Sequence[tuple[str, str]], rows: Iterable[Sequence[str]], kind: str = "wide") -> str:
    """A table that becomes a list of cards on a narrow screen.

    head: title and class of each column; the first column names the row. rows: cells as HTML.
    """
    titles = "".join(f'<th scope="col" class="{css}">{text(title)}</th>' for title, css in head)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="{"title" if not column else css}" data-label="{text(title)}"><span>{cell}</span></td>'
            for column, ((title, css), cell) in enumerate(zip(head, row, strict=True))
        )
        + "</tr>"
        for row in rows
    )
    return f'<table class="{kind}"><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>'


def counted(share: float, ci95: Sequence[float], n: int, bar: bool = False) -> str:
    """A share with its count and its interval, and a bar of both on request."""
    low, high = (min(max(100 * end, 0.0), 100.0) for end in ci95)
    track = (
        f'<span class="track"><i style="width:{100 * share:.2f}%"></i>'
        f'<b style="left:{low:.2f}%;right:{100 - high:.2f}%"></b></span>'
    )
    return f"{percent(share)}{track if bar else ''}{small(f'{round(share * n)} of {n};', interval(ci95))}"


def small(*phrases: str) -> str:
    """Phrases in small type, broken between them only."""
    spans = (f'<span class="phrase">{text(phrase)}</span>' for phrase in phrases)
    return f"<small>{' '.join(spans)}</small>"


def decode(encoded: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Base64 text to uint8 of a shape.

    Raises:
        InputError: not base64, or of another size than it says.
    """
    if not all(1 <= side <= MAX_SIDE for side in shape):
        raise InputError(f"an image of the report has an impossible size: {shape}")
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise InputError(f"an image of the report is not base64: {exc}") from exc
    if len(data) != math.prod(shape):
        raise InputError(f"an image of the report holds {len(data)} bytes, its shape {shape} needs {math.prod(shape)}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def image(pixels: NDArray[np.uint8], mask: NDArray[np.bool_] | None, alt: str) -> str:
    """An embedded picture. pixels: (3, H, W) uint8; mask: (H, W) bool."""
    data = base64.b64encode(encode(pixels, mask)).decode("ascii")
    return f'<img alt="{text(alt)}" src="data:image/png;base64,{data}">'
