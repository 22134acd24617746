"""Reports as SARIF, which code hosts show beside a change: one result for everything that failed, none for the rest.

Source: OASIS Static Analysis Results Interchange Format 2.1.0: sarifLog (3.13), run (3.14), invocation (3.20),
result (3.27), location (3.28), reportingDescriptor (3.49).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import edgeguard
from edgeguard.report.figures import CHECK_NAMES, Report, interval, percent
from edgeguard.report.markup import printable

VERSION = "2.1.0"
SCHEMA_URI = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
RULES = {
    "incomplete": "The verification ran to its end",
    "gate": "The report meets a rule of the gate",
    "trust": "A check on the evaluation itself passes",
    "survival": "Robustness survives the export",
    "integer": "Every multiply-accumulate runs in an integer kernel",
}
Finding = tuple[str, str, str]
"""Rule, level and message."""


def sarif(reports: Sequence[tuple[Path, Report]]) -> dict[str, Any]:
    """The document: one run per report, in their order.

    reports: where each was read from, which is the place of its results, and the report.
    """
    return {"$schema": SCHEMA_URI, "version": VERSION, "runs": [_run(path, report) for path, report in reports]}


def _run(path: Path, report: Report) -> dict[str, Any]:
    found = list(findings(report))
    known: list[str] = list(dict.fromkeys(rule for rule, _, _ in found))
    rules = [{"id": rule, "name": _name(rule), "shortDescription": {"text": _describe(rule)}} for rule in known]
    place = {"physicalLocation": {"artifactLocation": {"uri": _uri(path)}, "region": {"startLine": 1}}}
    artifact = report["artifact"]
    engine = f"{artifact['name']}/{artifact['target']}/{artifact['width']}"
    results = [
        {
            "ruleId": rule, "ruleIndex": known.index(rule), "level": level, "message": {"text": printable(message)},
            "locations": [place],
            "partialFingerprints": {"edgeguard/v1": printable(f"{engine}/{rule}")},
        }
        for rule, level, message in found
    ]  # fmt: skip
    driver = {"name": "EdgeGuard", "version": edgeguard.__version__, "rules": rules}
    properties = {"artifact": printable(artifact["name"]), "artifactSha256": printable(artifact["sha256"]),
                  "dataSha256": printable(report["data"]["sha256"])}  # fmt: skip
    invocation = {"executionSuccessful": report["status"]["complete"]}
    return {"tool": {"driver": driver}, "invocations": [invocation], "columnKind": "unicodeCodePoints",
            "results": results, "properties": properties}  # fmt: skip


def findings(report: Report) -> Iterator[Finding]:
    """What failed in a report, the gravest first."""
    name = report["artifact"]["name"]
    if not report["status"]["complete"]:
        yield "incomplete", "error", f"{name}: {report['status']['reason']}"
    for check in report["trust"]:
        if check["passed"] is False:
            yield f"trust/{check['check']}", "error", f"{name}: {check['detail']}"
    for rule in (report["gate"] or {"rules": []})["rules"]:
        if not rule["passed"]:
            yield f"gate/{rule['rule']}", "error", f"{name}: {rule['detail']}"
    survival = report["survival"]
    if survival and survival["verdict"] == "did not survive":
        change = f"{percent(survival['delta_asr'], True)} ({interval(survival['ci95'], True)}), n = {survival['n']}"
        yield "survival", "error", f"{name}: the engine is easier to attack than its twin, ASR {change}"
    coverage = report["artifact"]["integer_mac_coverage"]
    if coverage is None:
        yield "integer", "warning", f"{name}: the artifact does not say which of its layers are integer"
    elif coverage < 1:
        share = min(100 * coverage, 99.9999)
        yield "integer", "error", f"{name}: only {share:.6g} % of the multiply-accumulates run in integer kernels"


def _describe(rule: str) -> str:
    group, _, detail = rule.partition("/")
    return printable(f"{RULES[group]}: {CHECK_NAMES.get(detail, detail)}" if detail else RULES[group])


def _name(rule: str) -> str:
    return "".join(word.capitalize() for word in printable(rule).replace("/", "_").split("_"))


def _uri(path: Path) -> str:
    return path.as_uri() if path.is_absolute() else quote(path.as_posix())
