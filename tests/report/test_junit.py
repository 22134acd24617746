from __future__ import annotations

from xml.etree import ElementTree as Xml

from report_example import attack, example_report, minimal_report
from test_html import HOSTILE, poison

from edgeguard.report.junit import junit


def cases(root: Xml.Element, group: str) -> dict[str, Xml.Element]:
    found = [case for case in root.iter("testcase") if case.get("classname") == f"edgeguard.{group}"]
    return {case.get("name", ""): case for case in found}


def test_one_case_for_everything_that_was_judged() -> None:
    root = Xml.fromstring(junit([example_report()]))
    suite = root[0]
    assert suite.get("name") == "resnet20-w4 (ort, 4 bit)"
    assert {group: len(cases(root, group)) for group in ("verification", "gate", "trust", "survival", "attack")} == {
        "verification": 1, "gate": 1, "trust": 2, "survival": 1, "attack": 3,
    }  # fmt: skip
    assert [suite.get(key) for key in ("tests", "failures", "errors", "skipped")] == ["8", "0", "0", "2"]
    assert root.get("tests") == "8"


def test_attacks_carry_their_figures() -> None:
    case = cases(Xml.fromstring(junit([example_report()])), "attack")[
        "A-QAPA, engine access, 6x6, random placement, crafted on 4"
    ]
    figures = {entry.get("name"): entry.get("value") for entry in case.iter("property")}
    assert case.get("time") == "12.500"
    assert (figures["asr"], figures["n"], figures["ci95_high"], figures["steps"]) == ("0.45", "90", "0.5", "300")


def test_failures_are_failures_and_what_did_not_run_is_skipped() -> None:
    report = minimal_report(
        gate={"passed": False, "rules": [{"rule": "max_asr", "limit": 0.1, "figure": 0.4, "ci95": None, "passed": False,
                                          "detail": "too weak"}]},
        trust=[{"check": "deterministic", "passed": False, "detail": "differs"}],
    )  # fmt: skip
    root = Xml.fromstring(junit([report]))
    failures = {
        case.get("name"): case[0].get("message") for case in root.iter("testcase") if case.find("failure") is not None
    }
    assert failures == {"max_asr": "too weak", "The engine is deterministic": "differs"}
    assert cases(root, "verification")["complete"].find("error") is not None
    assert [root.get(key) for key in ("failures", "errors", "skipped")] == ["2", "1", "1"]


def test_survival() -> None:
    outcomes = {}
    for verdict in ("survived", "did not survive", "undecided"):
        report = example_report()
        report["survival"]["verdict"] = verdict
        (case,) = cases(Xml.fromstring(junit([report])), "survival").values()
        outcomes[verdict] = [child.tag for child in case]
    assert outcomes == {"survived": [], "did not survive": ["failure"], "undecided": ["skipped"]}


def test_several_reports_are_several_suites() -> None:
    root = Xml.fromstring(junit([example_report(), minimal_report()]))
    assert [suite.get("id") for suite in root] == ["0", "1"]
    assert root.get("tests") == str(sum(int(suite.get("tests", "")) for suite in root))


def test_hostile_texts() -> None:
    report = poison(example_report())
    report["trust"][0].update(passed=False, detail=HOSTILE + "\x00\x1b]]>\ufffe")
    report["attacks"][0] = attack(0.2, name="\x08", source="&<>\"'")
    root = Xml.fromstring(junit([report]))
    assert HOSTILE + "\ufffd\ufffd]]>\ufffd" in [failure.get("message") for failure in root.iter("failure")]
    assert not list(root.iter("script"))
