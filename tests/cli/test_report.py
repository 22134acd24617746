"""`edgeguard report`. Needs no run and no artifact: reports alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

import pytest
from command_runner import Done, execute
from report_example import example_report, minimal_report

from edgeguard.cli.console import write_report


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    other = example_report()
    other["artifact"]["name"] = "other"
    (tmp_path / "verified").mkdir()
    for name, report in {"a": example_report(), "b": other, "verified/report": minimal_report()}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    return tmp_path


def one_sentence(done: Done, *words: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in done.stderr, done.stderr


def test_one_report(folder: Path) -> None:
    done = execute(folder, "report", "a.json", "--out", "shown")
    assert done.returncode == 0, done.stderr
    assert "Undecided" in done.stdout
    assert sorted(path.name for path in (folder / "shown").iterdir()) == ["junit.xml", "report.html", "report.sarif"]
    assert "resnet20-w4" in (folder / "shown/report.html").read_text()


def test_without_an_output_the_page_goes_below_runs(folder: Path) -> None:
    assert execute(folder, "report", "a.json").returncode == 0
    assert execute(folder, "report", "a.json").returncode == 0
    assert (folder / "runs/report/report.html").read_bytes() == (folder / "runs/report-2/report.html").read_bytes()


def test_several_reports_and_the_folder_of_one(folder: Path) -> None:
    done = execute(folder, "report", "a.json", "b.json", "verified", "--out", "shown", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [entry["letter"] for entry in document["reports"]] == ["A", "B", "C"]
    assert "comparison of 3 reports" in (folder / "shown/comparison.html").read_text()


def test_only_the_files_that_are_named(folder: Path) -> None:
    done = execute(
        folder, "report", "a.json", "--junit", "ci/j.xml", "--sarif", "ci/s.sarif", "--html", "page.html", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["schema"] == "edgeguard.report/1"
    assert Xml.parse(folder / "ci/j.xml").getroot().tag == "testsuites"
    assert json.loads((folder / "ci/s.sarif").read_text())["version"] == "2.1.0"
    assert (folder / "page.html").is_file()
    assert not (folder / "runs").exists()


def test_a_failed_gate_is_shown_and_is_no_failure_of_the_command(folder: Path) -> None:
    done = execute(folder, "report", "verified", "--junit", "j.xml")
    assert done.returncode == 0
    assert "Incomplete" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.json"], ["none.json", "does not exist"]),
        (["a.json", "a.json"], ["a.json", "the same report"]),
        (["a.json", "./a.json", "--out", "x"], ["the same report"]),
        (["a.json", "--html", "b.json"], ["b.json exists already"]),
        (["a.json", "--out", "verified"], ["verified exists already"]),
        (["a.json", "--html", "x", "--junit", "./x"], ["--html and --junit both name"]),
        (["a.json", "--junit", "b.json/x.xml"], ["cannot write to b.json"]),
        (["."], ["report.json does not exist"]),
    ],
)
def test_bad_calls(folder: Path, arguments: list[str], words: list[str]) -> None:
    before = sorted(folder.rglob("*"))
    one_sentence(execute(folder, "report", *arguments), *words)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", json.dumps(example_report())[:5000], json.dumps(example_report(schema="edgeguard.report/9")),
        "[" * 100_000, json.dumps(example_report()).replace("0.45", "NaN", 1),
        json.dumps(example_report(advice=["\ud800"])), json.dumps(example_report(patches=[])),
    ],
)  # fmt: skip
def test_files_that_are_no_report(folder: Path, content: str) -> None:
    (folder / "bad.json").write_text(content)
    for arguments in (["bad.json"], ["a.json", "bad.json", "--out", "x"]):
        one_sentence(execute(folder, "report", *arguments), "bad.json")
    assert not (folder / "x").exists()
    assert not (folder / "runs").exists()


def test_broken_pixels_leave_nothing_behind(folder: Path) -> None:
    report: dict[str, Any] = example_report()
    report["patches"][0]["pixels"] = "@@"
    (folder / "bad.json").write_text(json.dumps(report))
    one_sentence(execute(folder, "report", "bad.json", "--html", "x.html", "--junit", "j.xml"), "base64")
    assert not (folder / "j.xml").exists()


def test_what_was_written_before_a_failure_is_taken_back(folder: Path) -> None:
    one_sentence(execute(folder, "report", "a.json", "--html", "x.html", "--sarif", "b.json/s"), "cannot write")
    assert not (folder / "x.html").exists()


def test_a_device_without_charts_keeps_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = write_report(example_report(), tmp_path / "found")
    assert page == tmp_path / "found" / "report.json"
    assert [file.name for file in page.parent.iterdir()] == ["report.json"]
    said = capsys.readouterr().err
    assert 'report.html is not drawn: matplotlib is not installed; run: pip install "edgeguard[report]"' in said
    assert f"edgeguard report {page}" in said
