from __future__ import annotations

from typing import Any

import pytest
from report_example import example_report

from edgeguard.report.figures import headline
from edgeguard.report.summary import format_summary


def test_says_what_matters() -> None:
    text = format_summary(example_report())
    for part in (
        "resnet20-w4", "ort, 4-bit weights", "90.0 %", "83.0 to 94.0 %", "45.0 %", "40.0 to 50.0 %", "n = 100",
        "ASR = P[engine(x_adv) != y | engine(x) = y]", "undecided", "engine only 3", "all widths", "Gate: passed",
        "1 of 1 trust checks passed, 1 did not run", "200 images would decide it",
    ):  # fmt: skip
        assert part in text, part
    assert text.endswith("\n")
    assert max(map(len, text.splitlines())) <= 120


def test_columns_line_up() -> None:
    lines = format_summary(example_report()).splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("attack "))
    ends = [line.rindex("90") for line in lines[start + 2 : start + 4]]
    assert len(set(ends)) == 1


def test_parts_that_were_not_measured() -> None:
    report = example_report(survival=None, gate=None)
    report["clean"].update(twin=None, agreement=None, bit_identical=None, steps=None)
    text = format_summary(report)
    assert "Survival: not measured" in text
    assert "Gate" not in text


def test_control_characters_do_not_reach_the_terminal() -> None:
    report = example_report()
    report["artifact"]["name"] = "a\x1b[31mred\x07\r\u202eb"
    text = format_summary(report)
    assert all(character.isprintable() or character == "\n" for character in text)


@pytest.mark.parametrize(
    ("change", "mood", "words"),
    [
        ({}, "unknown", "Undecided"),
        ({"survival": None}, "unknown", "not measured"),
        ({"survival": {"verdict": "survived"}}, "good", "The gate passed"),
        ({"survival": {"verdict": "survived"}, "gate": None}, "unknown", "no gate decides"),
        (
            {"status": {"complete": False, "reason": "it died"}, "survival": {"verdict": "survived"}},
            "bad",
            "Incomplete",
        ),
        ({"survival": {"verdict": "did not survive"}}, "bad", "did not survive"),
        ({"gate": {"passed": False, "rules": [{"passed": False}, {"passed": True}]}}, "bad", "1 of 2 rules"),
        ({"trust": [{"passed": False}], "gate": {"passed": False, "rules": []}}, "bad", "Do not rely"),
    ],
)
def test_headline(change: dict[str, Any], mood: str, words: str) -> None:
    found = headline(example_report(**change))
    assert found[0] == mood
    assert words in found[1]


def test_logits_that_differ_are_shown_in_integer_steps() -> None:
    report = example_report()
    assert "integer steps: 0: 880, 1: 90, 3-4: 30" in format_summary(report)
    report["clean"]["bit_identical"] = True
    assert "integer steps" not in format_summary(report)
