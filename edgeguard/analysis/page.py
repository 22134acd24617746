"""An analysis as one HTML page and as lines of text, from the document alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import edgeguard
from edgeguard.analysis.study import DEFINITIONS, PARTS
from edgeguard.report.charts import bars, grid
from edgeguard.report.figures import interval, percent
from edgeguard.report.html import page, section
from edgeguard.report.markup import card, counted, facts, note, small, table, text

Document = Mapping[str, Any]
MEASURES = {"cosine": "Cosine", "hog_cosine": "HOG cosine", "edge_iou": "Edge overlap"}
TITLES = {
    "alignment": "Gradients across widths", "sensitivity": "Where a patch hurts", "visibility": "How visible a patch must be",
    "transfer": "What transfers",
}  # fmt: skip


def render_analysis(document: Document) -> str:
    """The page, as text to be written in UTF-8."""
    makers = {"alignment": _alignment, "sensitivity": _sensitivity, "visibility": _visibility, "transfer": _transfer}
    parts = [(part, TITLES[part], makers[part](document)) for part in PARTS if part in document]
    parts.append(("what", "What was analyzed", _what(document)))
    names = ", ".join(one["name"] for one in document["artifacts"])
    links = " ".join(f'<a href="#{anchor}">{text(title)}</a>' for anchor, title, _ in parts)
    brand = '<p class="brand"><b>EdgeGuard</b> analysis</p>'
    header = f"{brand}<h1>{text(names)}</h1><nav>{links}</nav>"
    return page(text(f"EdgeGuard analysis: {names}"), header, "".join(section(*part) for part in parts), edgeguard.__version__)


def _alignment(document: Document) -> str:
    rows = document["alignment"]
    if not rows:
        return note("Not measured: gradients are compared between artifacts, and there is only one.")
    names = [one["name"] for one in document["artifacts"]]
    parts = []
    for key, title in MEASURES.items():
        means = {(row["first"], row["second"]): row[key]["mean"] for row in rows}
        shares = [[1.0 if a == b else _shade(means.get((a, b), means.get((b, a)))) for b in names] for a in names]
        words = note(f"{DEFINITIONS[key]}. Mean, in hundredths.")
        parts.append(card(f"<p><b>{title}</b></p>", words, grid(names, names, shares, title)))
    head = (("Pair", ""), *((title, "n") for title in MEASURES.values()))
    cells = [
        (text(f"{row['first']} and {row['second']}"), *(_mean(row[key], row["chance"][key]) for key in MEASURES))
        for row in rows
    ]
    return f'<div class="split">{"".join(parts)}</div>{card(table(head, cells))}'


def _shade(mean: float | None) -> float | None:
    return None if mean is None else min(1.0, max(0.0, mean))


def _mean(found: Mapping[str, Any], chance: Mapping[str, Any]) -> str:
    if found["mean"] is None:
        return "no gradient"
    low, high = found["ci95"]
    between = "" if chance["mean"] is None else f"; {chance['mean']:.3f} between different images"
    return f"{found['mean']:.3f}{small(f'{low:.3f} to {high:.3f},', 'n = ' + str(found['n']) + between)}"


def _sensitivity(document: Document) -> str:
    parts = [note(f"{DEFINITIONS['sensitivity']}. In percent.")]
    for row in document["sensitivity"]:
        size = row["patch_size"]
        title = f"{row['artifact']}, {size}x{size}, n = {row['n']}"
        rows, columns = (list(map(str, row[axis])) for axis in ("rows", "columns"))
        parts.append(card(f"<p><b>{text(title)}</b></p>", grid(rows, columns, row["asr"], title)))
    return f'{parts[0]}<div class="split">{"".join(parts[1:])}</div>'


def _visibility(document: Document) -> str:
    parts = []
    for row in document["visibility"]:
        drawn = []
        for key, label in (("by_size", _size), ("by_opacity", _opacity)):
            labels = [label(entry) for entry in row[key]]
            shares = [(entry["asr"], *entry["ci95"]) for entry in row[key]]
            drawn.append(bars(labels, shares, [entry["n"] for entry in row[key]], f"{row['artifact']}, {key}"))
        parts.append(card(f"<p><b>{text(row['artifact'])}</b></p>", *drawn))
    words = note(f"ASR: {DEFINITIONS['asr']}. {DEFINITIONS['opacity']}. Colour difference: {DEFINITIONS['delta_e']}.")
    return f'{words}<div class="split">{"".join(parts)}</div>'


def _size(entry: Mapping[str, Any]) -> str:
    return f"{entry['patch_size']}x{entry['patch_size']}, {entry['share_of_image']:.1%}"


def _opacity(entry: Mapping[str, Any]) -> str:
    return f"opacity {entry['opacity']:g}, ΔE {entry['delta_e']:.0f}"


def _transfer(document: Document) -> str:
    found = document["transfer"]
    engines = [one["name"] for one in document["artifacts"]]
    sources = list(dict.fromkeys(row["surrogate"] for row in found["rows"]))
    cells = {(row["surrogate"], row["engine"]): row for row in found["rows"]}
    shares = [[cells[source, engine]["asr"] for engine in engines] for source in sources]
    size = found["patch_size"]
    drawn = grid(sources, engines, shares, f"transfer of {size}x{size} patches")
    head = (("Crafted on", ""), *((engine, "n") for engine in engines))
    lines = [(text(source), *(_rate(cells[source, engine]) for engine in engines)) for source in sources]
    lines.append(("Largest over surrogates", *(_rate(row) for row in found["aggregated"])))
    words = note(f"{DEFINITIONS['transfer']}. {size}x{size} pixels; rows: the surrogate, columns: the engine.")
    return f"{words}{card(drawn)}{card(table(head, lines))}"


def _rate(row: Mapping[str, Any]) -> str:
    return counted(row["asr"], row["ci95"], row["n"])


def _what(document: Document) -> str:
    data = document["data"]
    pairs: list[tuple[str, object]] = [
        ("Judged on", f"{data['n']} images of {data['name']}, seed {document['options']['seed']}"),
        ("Crafted on", f"{data['crafted_on']} other images"),
        ("SHA-256 of the data", data["sha256"]),
        ("Command", " ".join(document["command"])),
    ]
    for one in document["artifacts"]:
        clean = one["accuracy"]
        pairs.append((one["name"], f"clean accuracy {percent(clean['accuracy'])} ({interval(clean['ci95'])}, n = {clean['n']}); "
                                   f"SHA-256 of its manifest {one['sha256']}"))  # fmt: skip
    pairs += [(f"Definition: {name}", words) for name, words in DEFINITIONS.items()]
    return card(facts(pairs))


def format_analysis(document: Document) -> str:
    """The key figures for a terminal."""
    lines = [f"{one['name']}: clean accuracy {percent(one['accuracy']['accuracy'])}, n = {one['accuracy']['n']}"
             for one in document["artifacts"]]  # fmt: skip
    lines += _alignment_lines(document.get("alignment", []))
    for row in document.get("sensitivity", []):
        shares = [share for line in row["asr"] for share in line]
        spread = f"{percent(min(shares))} to {percent(max(shares))}"
        lines.append(f"places, {row['artifact']}: ASR {spread} over {len(shares)} places, n = {row['n']}")
    for row in document.get("visibility", []):
        for key, label in (("by_size", _size), ("by_opacity", _opacity)):
            rates = "; ".join(f"{label(entry)}: {percent(entry['asr'])}" for entry in row[key])
            lines.append(f"visibility, {row['artifact']}: {rates}; n = {row[key][0]['n']}")
    for row in document.get("transfer", {}).get("rows", []):
        rate = f"{percent(row['asr'])} ({interval(row['ci95'])}, n = {row['n']})"
        lines.append(f"transfer, {row['surrogate']} -> {row['engine']}: {rate}")
    return "\n".join([*lines, f"ASR: {DEFINITIONS['asr']}"])


def _alignment_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"gradients, {row['first']} and {row['second']}: "
        + ", ".join(_measure(title, row[key], row["chance"][key]) for key, title in MEASURES.items() if row[key]["n"])
        + f", n = {row['cosine']['n']}"
        for row in rows
    ]


def _measure(title: str, found: Mapping[str, Any], chance: Mapping[str, Any]) -> str:
    low, high = found["ci95"]
    between = "" if chance["mean"] is None else f" (different images {chance['mean']:.3f})"
    return f"{title.lower()} {found['mean']:.3f} [{low:.3f}, {high:.3f}]{between}"
