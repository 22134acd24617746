"""A report as one HTML page: no network, no scripts, light and dark, on a phone, a screen and paper.

Made from the JSON document alone. Every text of it is escaped, for a class name may be hostile, and the page's content
security policy forbids everything but its own style and embedded images.
"""

from __future__ import annotations

from typing import Any

from edgeguard.report import evidence, sections
from edgeguard.report.figures import (
    Report,
    attack_name,
    headline,
    interval,
    model_line,
    percent,
    strongest,
    trust_sentence,
    weakest_robustness,
)
from edgeguard.report.markup import text
from edgeguard.report.read import check_report
from edgeguard.report.style import STYLE

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
TAGS = {"good": "Survived the export", "bad": "Not accepted", "unknown": "Open"}


def render_html(report: Report) -> str:
    """The page on one report, as text to be written in UTF-8.

    Raises:
        InputError: when the document is not a report.
        MissingDependency: matplotlib, which draws the charts, is not installed.
    """
    checked = check_report(report)
    mood, sentence = headline(checked)
    name = text(checked["artifact"]["name"])
    parts = [
        ("attacks", "Attacks", sections.attack_table),
        *([("gate", "The gate", sections.gate_rules)] if checked["gate"] is not None else []),
        ("patches", "The patches", sections.patch_images),
        ("images", "Patched images", sections.example_images),
        ("places", "Where the patch works", evidence.heat_map),
        ("transfer", "Transfer from surrogates", evidence.transfer),
        ("survival", "Did robustness survive?", sections.survival),
        ("trust", "Can these numbers be trusted?", sections.trust_checks),
        ("layers", "Engine against twin, layer by layer", evidence.divergence),
        ("unseen", "What training saw, and what it did not", evidence.seen_unseen),
        ("advice", "Would more images or a longer search change it?", evidence.advice),
        ("limits", "What was not tested", evidence.untested),
        ("environment", "What was measured", sections.environment),
        ("repeat", "How to repeat it", sections.repeat),
    ]
    links = " ".join(f'<a href="#{anchor}">{text(title)}</a>' for anchor, title, _ in parts)
    header = f"""<p class="brand"><b>EdgeGuard</b> verification of <b>{name}</b> · {text(model_line(checked))}</p>
<div class="headline {mood}">
<p class="tag">{TAGS[mood]}</p>
<h1>{text(sentence)}</h1>
<p>{_verdict_details(checked)}</p>
</div>
{_numbers(checked)}
<nav>{links}</nav>"""
    body = "".join(section(anchor, title, build(checked)) for anchor, title, build in parts)
    return page(f"{name}: {text(sentence)}", header, body, checked["edgeguard"])


def page(title: str, header: str, body: str, version: str) -> str:
    """A whole document around what was rendered. title, header, body: HTML; version: of the program, as text."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="generator" content="EdgeGuard {text(version)}">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
{header}
</header>
{body}
</main>
</body>
</html>
"""


def section(anchor: str, title: str, body: str) -> str:
    """A titled part of the page that links can lead to."""
    return f'<section id="{anchor}">\n<h2>{text(title)}</h2>\n{body}\n</section>\n'


def _verdict_details(report: Report) -> str:
    reason = str(report["status"]["reason"])
    parts = [] if report["status"]["complete"] else [text(reason[:1].upper() + reason[1:])]
    found = report["survival"]
    if found:
        parts.append(
            f"Survival: {text(found['verdict'])}, ASR on the engine minus on its twin "
            f"{percent(found['delta_asr'], True)} ({interval(found['ci95'], True)}, n = {found['n']})"
        )
    else:
        parts.append("Survival: not measured")
    parts.append(text(trust_sentence(report)))
    if report["gate"] is not None:
        parts.append("gate passed" if report["gate"]["passed"] else "gate failed")
    return ". ".join(part[:1].upper() + part[1:] for part in parts) + "."


def _numbers(report: Report) -> str:
    """The three numbers that matter."""
    clean, attack, robust = report["clean"]["engine"], strongest(report), weakest_robustness(report)
    cards = (
        _card("Clean accuracy", clean["accuracy"], clean["ci95"], clean["n"], f"without a patch, on the engine{_twin(report)}"),
        _card("Attack success rate", attack["asr"], attack["ci95"], attack["n"], f"strongest: {attack_name(attack)}"),
        _card("Robust accuracy", robust["robust_accuracy"], robust["robust_ci95"], robust["robust_n"],
              f"under {attack_name(robust)}"),
    )  # fmt: skip
    return f'<div class="numbers">\n{"".join(cards)}</div>'


def _card(label: str, value: float, ci95: list[float], n: int, detail: str) -> str:
    return (
        f'<div class="card"><p class="label">{text(label)}</p><p class="value">{percent(value)}</p>'
        f'<p class="detail">95 % interval {interval(ci95)}, n = {n}</p><p class="detail">{text(detail)}</p></div>\n'
    )


def _twin(report: Report) -> str:
    clean: dict[str, Any] = report["clean"]
    if clean["bit_identical"]:
        return "; bit-identical to its twin"
    return "" if clean["agreement"] is None else f"; same answer as its twin on {percent(clean['agreement'])}"
