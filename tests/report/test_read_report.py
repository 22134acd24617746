from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_example import example_report, minimal_report

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
        ({"status": {"complete": "yes", "reason": None}}, "complete must be bool, got str"),
        ({"advice": [1]}, r"advice\[0\] must be str"),
        ({"timing": {"attacks": [1.0], "total": 1.0}}, "3 attacks, and times of 1"),
        ({"timing": {"attacks": [1.0, -1.0, 1.0], "total": 1.0}}, r"timing.attacks\[1\] must be from 0"),
        ({"seen_unseen": [{"split": "size", "seen": None}]}, "unseen is missing"),
        ({"definitions": {"asr": 3}}, "definitions.asr must be str"),
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


def test_as_little_as_there_can_be() -> None:
    report = minimal_report()
    assert check_report(report) is report


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("asr", 1.5, r"attacks\[0\].asr must be from 0 to 1, got 1.5"),
        ("asr", float("nan"), "a number that is none"),
        ("asr", float("inf"), "a number that is none"),
        ("asr", 10**400, "a number that is none"),
        ("asr", True, "must be int or float, got bool"),
        ("n", 9.0, "n must be int, got float"),
        ("n", -1, "n must be from 0"),
        ("ci95", [0.6, 0.5], "the lower first"),
        ("ci95", ["low", 0.5], r"ci95\[0\] must be int or float, got str"),
        ("scope", "both", "must be universal or per-image, got 'both'"),
        ("patch", 2, "refers to a patch"),
        ("patch", -1, "patch must be from 0"),
        ("steps", "many", "steps must be int, got str"),
        ("name", "\ud800", "not valid Unicode"),
    ],
)
def test_values_that_no_attack_has(key: str, value: Any, message: str) -> None:
    report = example_report()
    report["attacks"][0][key] = value
    with pytest.raises(InputError, match=message):
        check_report(report)


@pytest.mark.parametrize(
    "change", [{"rows": []}, {"n": 0}, {"asr": [[0.1, 0.2]]}, {"asr": [[0.1], [0.1], [0.1]]}, {"patch": 7}]
)
def test_heat_maps_that_do_not_fit(change: dict[str, Any]) -> None:
    report = example_report()
    report["heat_map"].update(change)
    with pytest.raises(InputError, match=r"heat map|refers to a patch"):
        check_report(report)


@pytest.mark.parametrize("inner", ["NaN", "1e999", "-Infinity", "9" * 400, "[" * 40 + "]" * 40, '"\\ud800"'])
def test_hostile_values_anywhere(tmp_path: Path, inner: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(example_report(options={"extra": "HERE"})).replace('"HERE"', inner))
    with pytest.raises(InputError, match=r"report\.json"):
        read_report(path)


def test_nesting_that_json_itself_cannot_read(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text('{"schema": ' + "[" * 200_000)
    with pytest.raises(InputError, match="not valid JSON"):
        read_report(path)


def test_another_version_is_named() -> None:
    with pytest.raises(InputError, match=r"its schema is 'edgeguard\.report/2'"):
        check_report(example_report(schema="edgeguard.report/2"))
