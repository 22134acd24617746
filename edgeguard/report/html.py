"""A report as one HTML page: no network, no scripts, light and dark, on a phone, a screen and paper.

Made from the JSON document alone. Every text of it is escaped, for a class name may be hostile, and the page's content
security policy forbids everything but its own style and embedded images.
"""

from __future__ import annotations

from typing import Any

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
from edgeguard.report.read import check_report
from edgeguard.report.sections import (
    attack_table,
    environment,
    example_images,
    gate_rules,
    patch_images,
    survival,
    text,
    trust_checks,
)
from edgeguard.report.style import STYLE

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
TAGS = {"good": "Survived the export", "bad": "Not accepted", "unknown": "Open"}


def render_html(report: Report) -> str:
    """The page, as text to be written in UTF-8.

    Raises:
        InputError: when the document is not a report.
    """
    checked = check_report(report)
    mood, sentence = headline(checked)
    name = text(checked["artifact"]["name"])
    sections = (
        _section("Attacks", attack_table(checked)),
        _section("The patches", patch_images(checked)),
        _section("Six patched images", example_images(checked)),
        _section("Did robustness survive?", survival(checked)),
        _section("Can these numbers be trusted?", trust_checks(checked)),
        _section("The gate", gate_rules(checked)) if checked["gate"] is not None else "",
        _section("What was measured, and how to repeat it", environment(checked)),
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="generator" content="EdgeGuard {text(checked["edgeguard"])}">
<title>{name}: {text(sentence)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
<p class="brand"><b>EdgeGuard</b> verification of <b>{name}</b> · {text(model_line(checked))}</p>
<div class="headline {mood}">
<p class="tag">{TAGS[mood]}</p>
<h1>{text(sentence)}</h1>
<p>{_verdict_details(checked)}</p>
</div>
{_numbers(checked)}
</header>
{"".join(sections)}
</main>
</body>
</html>
"""


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{text(title)}</h2>\n{body}\n</section>\n"


def _verdict_details(report: Report) -> str:
    parts = []
    found = report["survival"]
    if found:
        parts.append(
            f"Survival: {text(found['verdict'])}, ASR on the engine minus on its twin "
            f"{percent(found['delta_asr'], True)} ({interval(found['ci95'], True)})"
        )
    else:
        parts.append("Survival: not measured")
    parts.append(text(trust_sentence(report)))
    if report["gate"] is not None:
        parts.append("gate passed" if report["gate"]["passed"] else "gate failed")
    return "; ".join(parts) + "."


def _numbers(report: Report) -> str:
    """The three numbers that matter."""
    clean, attack, robust = report["clean"]["engine"], strongest(report), weakest_robustness(report)
    cards = (
        _card("Clean accuracy", clean["accuracy"], clean["ci95"], f"{clean['n']} images on the engine{_twin(report)}"),
        _card("Attack success rate", attack["asr"], attack["ci95"], f"strongest attack: {attack_name(attack)}"),
        _card("Robust accuracy", robust["robust_accuracy"], robust["robust_ci95"], f"under {attack_name(robust)}"),
    )
    return f'<div class="numbers">\n{"".join(cards)}</div>'


def _card(label: str, value: float, ci95: list[float], detail: str) -> str:
    return (
        f'<div class="card"><p class="label">{text(label)}</p><p class="value">{percent(value)}</p>'
        f'<p class="detail">95 % interval {interval(ci95)}</p><p class="detail">{text(detail)}</p></div>\n'
    )


def _twin(report: Report) -> str:
    clean: dict[str, Any] = report["clean"]
    if clean["bit_identical"]:
        return ", bit-identical to its twin"
    return "" if clean["agreement"] is None else f", same answer as its twin on {percent(clean['agreement'])}"
