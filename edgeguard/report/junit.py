"""Reports as JUnit XML, which build servers show.

One suite per report; one test case for its completeness, each rule of the gate, each trust check, survival, and each
attack, whose figures are properties. What could not run is skipped, not passed.
Source: the de facto format of Apache Ant's JUnitReport, as Jenkins and GitLab read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree as Xml

from edgeguard.report.figures import CHECK_NAMES, Report, attack_name, interval, percent
from edgeguard.report.markup import printable

PROPERTIES = ("asr", "robust_accuracy", "twin_asr", "n", "robust_n", "queries", "steps", "places", "source")


def junit(reports: Sequence[Report]) -> bytes:
    """The document, UTF-8."""
    root = Xml.Element("testsuites", name="edgeguard")
    for number, report in enumerate(reports):
        _suite(root, report, number)
    for key in ("tests", "failures", "errors", "skipped"):
        root.set(key, str(sum(int(suite.get(key, "0")) for suite in root)))
    Xml.indent(root, " ")
    body: bytes = Xml.tostring(root, encoding="utf-8")
    return b'<?xml version="1.0" encoding="UTF-8"?>\n' + body + b"\n"


def _suite(root: Xml.Element, report: Report, number: int) -> None:
    artifact = report["artifact"]
    name = f"{artifact['name']} ({artifact['target']}, {artifact['width']} bit)"
    suite = Xml.SubElement(
        root, "testsuite", name=printable(name), id=str(number), time=f"{report['timing']['total']:.3f}"
    )
    _properties(suite, {"artifact.sha256": artifact["sha256"], "data.sha256": report["data"]["sha256"],
                        "edgeguard": report["edgeguard"], "seed": report["environment"]["seed"]})  # fmt: skip
    status = report["status"]
    _case(suite, "verification", "complete", None if status["complete"] else ("error", str(status["reason"])))
    for rule in (report["gate"] or {"rules": []})["rules"]:
        _case(suite, "gate", rule["rule"], None if rule["passed"] else ("failure", rule["detail"]))
    for check in report["trust"]:
        outcome = {True: None, False: ("failure", check["detail"]), None: ("skipped", check["detail"])}[check["passed"]]
        _case(suite, "trust", CHECK_NAMES.get(check["check"], check["check"]), outcome)
    _case(suite, "survival", "robustness survived the export", _survival(report))
    for attack, seconds in zip(report["attacks"], report["timing"]["attacks"], strict=True):
        source = f", crafted on {attack['source']}" if attack["source"] else ""
        case = _case(suite, "attack", attack_name(attack) + source, None, seconds)
        figures = {key: attack[key] for key in PROPERTIES if attack[key] is not None}
        ends = {"ci95_low": attack["ci95"][0], "ci95_high": attack["ci95"][1]}
        _properties(case, {**figures, **ends})
    for key, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(key, str(len(suite.findall(f"testcase/{tag}"))))
    suite.set("tests", str(len(suite.findall("testcase"))))


def _survival(report: Report) -> tuple[str, str] | None:
    found = report["survival"]
    if found is None:
        return "skipped", "not measured: it needs the twin, and the twin needs torch"
    if found["verdict"] == "survived":
        return None
    detail = (
        f"{found['verdict']}: ASR on the engine minus on its twin {percent(found['delta_asr'], True)} "
        f"({interval(found['ci95'], True)}), n = {found['n']}"
    )
    return "failure" if found["verdict"] == "did not survive" else "skipped", detail


def _case(
    suite: Xml.Element, group: str, name: str, outcome: tuple[str, str] | None, seconds: float = 0.0
) -> Xml.Element:
    case = Xml.SubElement(
        suite, "testcase", classname=f"edgeguard.{group}", name=printable(name), time=f"{seconds:.3f}"
    )
    if outcome is not None:
        Xml.SubElement(case, outcome[0], message=printable(outcome[1]))
    return case


def _properties(element: Xml.Element, values: Mapping[str, Any]) -> None:
    holder = Xml.SubElement(element, "properties")
    for name, value in values.items():
        Xml.SubElement(holder, "property", name=name, value=printable(value))
