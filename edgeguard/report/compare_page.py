"""A comparison as one HTML page, and as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import edgeguard
from edgeguard.report.charts import grid
from edgeguard.report.compare import BETTER, WORSE, Entry, compare, entries
from edgeguard.report.figures import ATTACK_NAMES, Report, interval, percent
from edgeguard.report.html import page, section
from edgeguard.report.markup import card, counted, facts, note, printable, small, table, text
from edgeguard.report.read import check_report

MOODS = {"good": "accepted", "bad": "not accepted", "unknown": "open"}
CHANGES = {BETTER: "good", WORSE: "bad"}
COLUMNS = 6
"""Reports in one chart."""


def render_comparison(reports: Sequence[Report]) -> str:
    """The page, as text to be written in UTF-8; the first report is what the others are compared with.

    Raises:
        InputError: a document is not a report, or fewer than two or more than 26 of them.
        MissingDependency: matplotlib, which draws the charts, is not installed.
    """
    found = entries([check_report(report) for report in reports])
    document = compare([entry.report for entry in found])
    parts = [
        ("figures", "Key figures", _figures(document["reports"])),
        ("changes", "What changed", "".join(_change(change, found) for change in document["changes"])),
        ("transfer", "Transfer from surrogates to engines", _transfer(document["transfer"], found)),
        ("hashes", "What was compared", _hashes(found)),
    ]
    names = ", ".join(f"{entry.letter}: {entry.report['artifact']['name']}" for entry in found)
    links = " ".join(f'<a href="#{anchor}">{text(title)}</a>' for anchor, title, _ in parts)
    brand = f'<p class="brand"><b>EdgeGuard</b> comparison of {len(found)} reports</p>'
    header = f"{brand}<h1>{text(names)}</h1><nav>{links}</nav>"
    return page(text(f"EdgeGuard comparison: {names}"), header, "".join(section(*part) for part in parts),
                edgeguard.__version__)  # fmt: skip


def _figures(rows: Sequence[Mapping[str, Any]]) -> str:
    head = (("Report", ""), ("Verdict", ""), ("Clean accuracy", "n"), ("Strongest attack, ASR", "meter"),
            ("Robust accuracy, lowest", "n"), ("Survival", ""), ("Trust, gate", ""))  # fmt: skip
    return card(table(head, map(_figure_cells, rows)))


def _figure_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    mood, trust, coverage = row["verdict"]["mood"], row["trust"], row["integer_mac_coverage"]
    integer = "integer share unknown" if coverage is None else f"{100 * coverage:.4g} % integer"
    engine = f"{row['target']}, {row['width']} bit, {integer}"
    ran = trust["passed"] + trust["failed"]
    checked = f"{trust['passed']} of {ran} checks passed" if ran else "no check ran"
    gate = {True: "gate passed", False: "gate failed", None: "no gate"}[row["gate"]]
    clean, strong, robust = row["clean"], row["strongest"], row["robust"]
    return (
        f"{row['letter']}: {text(row['name'])}<small>{text(engine)}</small>",
        f'<span class="mark {mood}">{MOODS[mood]}</span><small>{text(row["verdict"]["sentence"])}</small>',
        counted(clean["accuracy"], clean["ci95"], clean["n"]),
        f"{counted(strong['asr'], strong['ci95'], strong['n'], bar=True)}<small>{text(strong['attack'])}</small>",
        counted(robust["accuracy"], robust["ci95"], robust["n"]),
        text(row["survival"] or "not measured"),
        f"{text(checked)}{small(gate)}",
    )


def _change(change: Mapping[str, Any], found: Sequence[Entry]) -> str:
    names = {entry.letter: entry.report["artifact"]["name"] for entry in found}
    title = f"<p><b>{change['from']} to {change['to']}: {text(names[change['from']])} to {text(names[change['to']])}</b></p>"
    if not change["figures"]:
        return card(title, note(f"Not compared: {change['reason']}."))
    head = (("Figure", ""), ("Before", "n"), ("After", "n"), ("Difference", "n"), ("", ""))
    words = (
        "On the same images. An interval that leaves out zero is a difference; it is that of independent samples, and so "
        "rather too wide. Patches are crafted anew for each engine unless it says the same patch."
    )
    missing = note(f"No attack is compared: {change['reason']}.") if change["reason"] else ""
    return card(title, note(words), missing, table(head, map(_change_cells, change["figures"])))


def _change_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    same = small("the same patch, by SHA-256") if row["same_patch"] else ""
    return (
        f"{text(row['figure'])}{same}",
        f"{percent(row['before'])}{small('n = ' + str(row['before_n']))}",
        f"{percent(row['after'])}{small('n = ' + str(row['after_n']))}",
        f"{percent(row['difference'], True)}{small(interval(row['ci95'], True))}",
        f'<span class="mark {CHANGES.get(row["verdict"], "unknown")}">{text(row["verdict"])}</span>',
    )


def _transfer(matrices: Sequence[Mapping[str, Any]], found: Sequence[Entry]) -> str:
    if not matrices:
        return note("Not measured: no report holds a patch that was crafted on a surrogate.")
    by_letter = {entry.letter: entry for entry in found}
    parts = [note("ASR in percent. Rows: what the patch was crafted on. Columns: the engine that it was shown to.")]
    for matrix in matrices:
        name = ATTACK_NAMES.get(matrix["name"], matrix["name"])
        title = f"{name}, {matrix['patch_size']}x{matrix['patch_size']}, {matrix['placement']} placement, on {matrix['target']}"
        columns, surrogates = [by_letter[letter].label for letter in matrix["reports"]], matrix["surrogates"]
        shares = [[None if cell is None else cell["asr"] for cell in line] for line in matrix["cells"]]
        drawn = "".join(
            grid(
                surrogates, columns[start : start + COLUMNS], [line[start : start + COLUMNS] for line in shares], title
            )
            for start in range(0, len(columns), COLUMNS)
        )
        head = (("Crafted on", ""), *((column, "n") for column in columns))
        rows = ((text(origin), *map(_cell, line)) for origin, line in zip(surrogates, matrix["cells"], strict=True))
        intervals = f"<details><summary>Counts and intervals</summary>{table(head, rows)}</details>"
        parts.append(card(f"<p><b>{text(title)}</b></p>", drawn, intervals))
    return "".join(parts)


def _cell(cell: Mapping[str, Any] | None) -> str:
    return "not tried" if cell is None else counted(cell["asr"], cell["ci95"], cell["n"])


def _hashes(found: Sequence[Entry]) -> str:
    return "".join(
        card(facts((
            ("Report", f"{entry.letter}, by edgeguard {entry.report['edgeguard']}"),
            ("Artifact, SHA-256 of its manifest", entry.report["artifact"]["sha256"]),
            ("Judged on", f"{entry.report['data']['n']} of {entry.report['data']['of']} images of {entry.report['data']['name']}, "
                          f"seed {entry.report['environment']['seed']}"),
            ("SHA-256 of the data", entry.report["data"]["sha256"]),
        )))
        for entry in found
    )  # fmt: skip


def format_comparison(document: Mapping[str, Any]) -> str:
    """What `compare` returned, as lines of text."""
    lines = []
    for row in document["reports"]:
        clean, strong, robust = row["clean"], row["strongest"], row["robust"]
        lines += [
            f"{row['letter']}: {row['name']}, {row['target']}, {row['width']} bit: {row['verdict']['sentence']}.",
            f"   clean {percent(clean['accuracy'])} ({interval(clean['ci95'])}, n = {clean['n']}); highest ASR "
            f"{percent(strong['asr'])} ({interval(strong['ci95'])}, n = {strong['n']}); lowest robust accuracy "
            f"{percent(robust['accuracy'])} ({interval(robust['ci95'])}, n = {robust['n']})",
        ]
    for change in document["changes"]:
        lines += ["", f"{change['from']} to {change['to']}:"]
        lines += [f"   {change['reason']}"] if change["reason"] else []
        lines += [
            f"   {row['figure']}: {percent(row['before'])} to {percent(row['after'])}, {percent(row['difference'], True)} "
            f"({interval(row['ci95'], True)}): {row['verdict']}"
            for row in change["figures"]
        ]
    return "\n".join(printable(line) for line in lines) + "\n"
