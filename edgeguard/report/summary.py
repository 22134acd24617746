"""A report in a terminal: plain text, at most 100 columns for usual names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeguard.report.figures import (
    ATTACK_NAMES,
    CHECK_NAMES,
    Report,
    attack_name,
    headline,
    interval,
    member_rates,
    model_line,
    percent,
    steps_sentence,
    strongest,
    trust_sentence,
    weakest_robustness,
)

COLUMNS = ("attack", "access", "crafted on", "size", "placement", "ASR", "95 % interval", "twin", "robust", "n")
RIGHT = {"size", "ASR", "95 % interval", "twin", "robust", "n"}


def format_summary(report: Report) -> str:
    """The whole report as lines of text, ending in a newline."""
    parts = [
        [f"{report['artifact']['name']}: {model_line(report)}", headline(report)[1] + "."],
        _numbers(report),
        _table(report),
        [f"{report['definitions'].get('asr', '')}"],
        [f"Not tried: {one['attack']}; {one['reason']}." for one in report.get("skipped") or []],
        _survival(report),
        _trust(report),
        _gate(report),
        report["advice"],
        [f"Incomplete: {report['status']['reason']}."] if not report["status"]["complete"] else [],
    ]
    text = "\n\n".join("\n".join(part) for part in parts if part) + "\n"
    return "".join(character if character.isprintable() or character == "\n" else "?" for character in text)


def _numbers(report: Report) -> list[str]:
    clean, attack, robust = report["clean"]["engine"], strongest(report), weakest_robustness(report)
    twin = report["clean"]["twin"]
    beside = f"; twin {percent(twin['accuracy'])}" if twin else ""
    if report["clean"]["bit_identical"]:
        beside += ", bit-identical"
    elif report["clean"]["agreement"] is not None:
        beside += f", same answer on {percent(report['clean']['agreement'])}"
    rows = [
        ("Clean accuracy", clean["accuracy"], clean["ci95"], f"n = {clean['n']}{beside}"),
        ("Strongest attack", attack["asr"], attack["ci95"], attack_name(attack)),
        ("Robust accuracy", robust["robust_accuracy"], robust["robust_ci95"], "under the attack that leaves least"),
    ]
    lines = [f"{name:<17}{percent(value):>8}  ({interval(ci95)})  {note}" for name, value, ci95, note in rows]
    if member_rates(attack):
        lines.append(f"Random by design: rates are expectations over the draw. Strongest attack by member: {member_rates(attack)}")
    if report["clean"]["bit_identical"] is False:
        lines.append(f"Clean logits of engine and twin apart, in integer steps: {steps_sentence(report)}")
    return lines


def _cells(attack: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        ATTACK_NAMES.get(attack["name"], attack["name"]), attack["access"], attack["source"] or "-",
        str(attack["patch_size"]), attack["placement"], percent(attack["asr"]), interval(attack["ci95"]),
        percent(attack["twin_asr"]), percent(attack["robust_accuracy"]), str(attack["n"]),
    )  # fmt: skip


def _table(report: Report) -> list[str]:
    rows = [COLUMNS, *(_cells(attack) for attack in report["attacks"])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if title in RIGHT else cell.ljust(width)
            for cell, width, title in zip(row, widths, COLUMNS, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def _survival(report: Report) -> list[str]:
    found = report["survival"]
    if not found:
        return ["Survival: not measured; it needs the twin, and the twin needs torch."]
    flips = found["flips"]
    member = f" of member {found['member']}, the worst of the pool" if found.get("member") else ""
    return [
        f"Survival{member}: {found['verdict']}. ASR on the engine minus on the twin: {percent(found['delta_asr'], True)} "
        f"({interval(found['ci95'], True)}), McNemar p = {found['mcnemar_p']:.3g}, n = {found['n']}.",
        f"  fooled on both {flips['both']}, engine only {flips['engine_only']}, twin only {flips['twin_only']}, "
        f"neither {flips['neither']}",
    ]


def _trust(report: Report) -> list[str]:
    signs = {True: "ok  ", False: "FAIL", None: "-   "}
    lines = [f"Trust: {trust_sentence(report)}."]
    for check in report["trust"]:
        lines.append(f"  {signs[check['passed']]} {CHECK_NAMES.get(check['check'], check['check'])}: {check['detail']}")
    return lines


def _gate(report: Report) -> list[str]:
    gate = report["gate"]
    if gate is None:
        return []
    lines = [f"Gate: {'passed' if gate['passed'] else 'FAILED'}."]
    for rule in gate["rules"]:
        limit = "" if rule["limit"] is True else f" {rule['limit']:g}"
        lines.append(f"  {'ok  ' if rule['passed'] else 'FAIL'} {rule['rule']}{limit}: {rule['detail']}")
    return lines
