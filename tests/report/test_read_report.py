from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_example import example_report

from edgeguard.errors import InputError
from edgeguard.report.read import check_report, read_report


def test_reads_a_report(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(example_report()))
    assert read_report(path) == example_report()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "edgeguard.report/2"}, "schema"),
        ({"attacks": []}, "no attack"),
        ({"attacks": [{}]}, r"attacks\[0\]\.name is missing"),
        ({"clean": None}, "report.clean must be an object"),
        ({"trust": {}}, "report.trust must be a list"),
        ({"trust": [{"check": 3, "passed": True, "detail": ""}]}, "check must be str, got int"),
        ({"trust": [{"check": "x", "passed": "yes", "detail": ""}]}, "must be bool or null, got str"),
        ({"patches": []}, "a patch of the report|refers to a patch"),
        ({"examples": {"attack": 9, "images": []}}, "refers to an attack"),
    ],
)
def test_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_report(example_report(**change))


def test_parts_that_may_be_missing() -> None:
    report = example_report(survival=None, gate=None)
    report["clean"].update(twin=None, agreement=None, bit_identical=None, steps=None)
    assert check_report(report) is report


def test_intervals_have_two_ends() -> None:
    report = example_report()
    report["attacks"][0]["ci95"] = [0.1]
    with pytest.raises(InputError, match="interval of two numbers"):
        check_report(report)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '"x"', '{"schema": "edgeguard.report/1"}', "\x00"])
def test_files_that_are_no_report(tmp_path: Path, text: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"report\.json"):
        read_report(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_report(tmp_path / "none.json")
