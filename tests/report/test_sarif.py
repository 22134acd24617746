from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from report_example import example_report, minimal_report
from test_html import HOSTILE, poison

from edgeguard.report.sarif import findings, sarif

LEVELS = {"none", "note", "warning", "error"}
ALLOWED = {
    "log": {"$schema", "version", "runs"},
    "run": {"tool", "invocations", "columnKind", "results", "properties"},
    "driver": {"name", "version", "rules"},
    "rule": {"id", "name", "shortDescription"},
    "result": {"ruleId", "ruleIndex", "level", "message", "locations", "partialFingerprints"},
}
"""Properties that the published schema knows, as far as they are used; it forbids others."""


def check(document: dict[str, Any]) -> None:
    """What the published schema, and the rules in the text of the standard, ask of the parts we write."""
    assert document["version"] == "2.1.0"
    assert set(document) <= ALLOWED["log"]
    for run in document["runs"]:
        driver = run["tool"]["driver"]
        assert set(run) <= ALLOWED["run"]
        assert set(driver) <= ALLOWED["driver"]
        assert driver["name"]
        assert [type(invocation["executionSuccessful"]) for invocation in run["invocations"]] == [bool]
        identifiers = [rule["id"] for rule in driver["rules"]]
        assert len(set(identifiers)) == len(identifiers)
        assert all(set(rule) <= ALLOWED["rule"] and rule["shortDescription"]["text"] for rule in driver["rules"])
        for result in run["results"]:
            assert set(result) == ALLOWED["result"]
            assert identifiers[result["ruleIndex"]] == result["ruleId"]
            assert result["level"] in LEVELS
            assert result["message"]["text"]
            assert all(isinstance(value, str) for value in result["partialFingerprints"].values())
            place = result["locations"][0]["physicalLocation"]
            assert place["region"]["startLine"] == 1
            assert " " not in place["artifactLocation"]["uri"]


def failing() -> dict[str, Any]:
    report = example_report(status={"complete": False, "reason": "it died"})
    report["trust"][0].update(passed=False, detail="no gradient")
    report["gate"]["rules"][0].update(passed=False, detail="too weak")
    report["survival"]["verdict"] = "did not survive"
    report["artifact"]["integer_mac_coverage"] = 0.9999999
    return report


def test_nothing_failed() -> None:
    document = sarif([(Path("report.json"), example_report())])
    check(document)
    assert document["runs"][0]["results"] == []


def test_everything_that_failed() -> None:
    document = sarif([(Path("my runs/report.json"), failing()), (Path("/x/report.json"), minimal_report())])
    check(document)
    first, second = document["runs"]
    found = {result["ruleId"]: result["message"]["text"] for result in first["results"]}
    assert list(found) == ["incomplete", "trust/gradients_alive", "gate/max_asr", "survival", "integer"]
    assert "it died" in found["incomplete"]
    assert "too weak" in found["gate/max_asr"]
    assert "only 99.9999 %" in found["integer"]
    assert first["invocations"][0]["executionSuccessful"] is False
    place = first["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert place == "my%20runs/report.json"
    assert [result["level"] for result in second["results"]] == ["error", "warning"]
    assert (
        second["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "file:///x/report.json"
    )


def test_what_did_not_run_is_no_finding() -> None:
    assert list(findings(example_report(survival=None, gate=None))) == []


def test_hostile_texts() -> None:
    report = failing()
    report["trust"].append({"check": HOSTILE, "passed": False, "detail": HOSTILE + "\x00"})
    poisoned = poison(report)
    poisoned["survival"]["verdict"] = "did not survive"
    document = sarif([(Path(f"{HOSTILE.replace('/', '')}.json"), poisoned)])
    check(document)
    assert "\\u0000" not in json.dumps(document)
