from __future__ import annotations

from typing import Any

import pytest
from report_example import attack, example_report, minimal_report
from test_html import HOSTILE, Page, poison

from edgeguard.errors import InputError
from edgeguard.report.compare import compare
from edgeguard.report.compare_page import format_comparison, render_comparison
from edgeguard.statistics import difference


def engine(name: str, width: str = "4", target: str = "ort", **changes: Any) -> dict[str, Any]:
    report = example_report(**changes)
    report["artifact"].update(name=name, width=width, target=target)
    return report


def weaker(name: str = "after") -> dict[str, Any]:
    report = engine(name)
    report["attacks"][0] = attack(0.1)
    report["attacks"][1] = attack(0.31, access="transfer", patch=0, source="all widths")
    return report


def test_key_figures() -> None:
    first, second = compare([engine("before"), minimal_report()])["reports"]
    assert (first["letter"], first["name"], first["width"]) == ("A", "before", "4")
    assert first["clean"] == {"accuracy": 0.9, "ci95": [0.83, 0.94], "n": 100}
    assert (first["strongest"]["asr"], first["strongest"]["n"], first["gate"], first["complete"]) == (
        0.45,
        90,
        True,
        True,
    )
    assert first["trust"] == {"passed": 1, "failed": 0, "not_run": 1}
    assert (second["letter"], second["survival"], second["gate"], second["complete"]) == ("B", None, None, False)


def test_differences_on_the_same_images() -> None:
    (change,) = compare([engine("before"), weaker()])["changes"]
    clean, first, second, third = change["figures"]
    assert (clean["figure"], clean["difference"], clean["verdict"]) == ("clean accuracy", 0.0, "no clear difference")
    low, high = difference(9, 90, 40, 90)
    assert (first["ci95"], first["verdict"]) == ([low, high], "better")
    assert first["difference"] == pytest.approx(-0.35)
    assert "A-QAPA, engine access" in first["figure"]
    assert (first["same_patch"], second["same_patch"], third["same_patch"]) == (True, False, None)
    (back,) = compare([weaker(), engine("before")])["changes"]
    assert back["figures"][1]["verdict"] == "worse"


@pytest.mark.parametrize("part", ["data", "seed", "n"])
def test_other_images_are_not_compared(part: str) -> None:
    other = weaker()
    if part == "seed":
        other["environment"]["seed"] = 8
    else:
        other["data"].update({"data": {"sha256": "aa" * 32}, "n": {"n": 99}}[part])
    (change,) = compare([engine("before"), other])["changes"]
    assert change["figures"] == []
    assert "other images" in change["reason"]


@pytest.mark.parametrize("key", ["name", "access", "patch_size", "placement", "target", "stride", "steps"])
def test_other_attacks_are_not_compared(key: str) -> None:
    first, second = engine("before"), engine("after")
    for report in (first, second):
        report["attacks"] = report["attacks"][:1]
    second["attacks"][0][key] = 3 if key in ("patch_size", "target", "stride", "steps") else "other"
    (change,) = compare([first, second])["changes"]
    assert [row["figure"] for row in change["figures"]] == ["clean accuracy"]
    assert "share no attack" in change["reason"]


def test_engines_of_two_widths_compare_their_own_white_box_attacks() -> None:
    second = engine("w8", "8")
    second["attacks"][0]["source"] = "8"
    (change,) = compare([engine("w4"), second])["changes"]
    assert any("engine access, 6x6" in row["figure"] for row in change["figures"])


def test_transfer_by_surrogate_width_and_runtime() -> None:
    reports = [engine("a"), engine("b", "8"), engine("c", target="openvino")]
    reports[1]["attacks"].append(attack(0.77, access="transfer", source="2"))
    matrices = compare(reports)["transfer"]
    assert [(matrix["target"], matrix["reports"]) for matrix in matrices] == [("openvino", ["C"]), ("ort", ["A", "B"])]
    assert matrices[1]["surrogates"] == ["twin 2", "twin all widths", "this engine"]
    assert matrices[1]["cells"][0][0] is None
    assert matrices[1]["cells"][0][1]["asr"] == 0.77


def test_how_many() -> None:
    with pytest.raises(InputError, match="2 to 26 reports, got 1"):
        compare([example_report()])
    with pytest.raises(InputError, match="got 27"):
        compare([example_report()] * 27)


def test_the_page() -> None:
    reports = [engine("before"), weaker(), engine("other", target="openvino"), minimal_report()]
    html = render_comparison(reports)
    page = Page(html)
    for part in (
        "A: before, B: after", "90.0 %", "90 of 100; 83.0 to 94.0 %", "-35.0 %", "better", "no clear difference",
        "the same patch, by SHA-256", "on openvino", "A, 4 bit", "not accepted", "not tried",
        "ef" * 32,
    ):  # fmt: skip
        assert part in page.text, part
    assert page.tags.count("svg") == 2
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "http:" not in html
    assert html == render_comparison(reports)


def test_hostile_texts_are_escaped() -> None:
    html = render_comparison([poison(example_report()), poison(weaker())])
    page = Page(html)
    assert "script" not in page.tags
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert HOSTILE in page.text


def test_the_terminal() -> None:
    text = format_comparison(compare([engine("be\x1bfore"), weaker()]))
    assert "\x1b" not in text
    assert "A-QAPA, engine access, 6x6, random placement: 45.0 % to 10.0 %, -35.0 %" in text
    assert "n = 100" in text


def test_rates_of_no_images_are_refused() -> None:
    report = weaker()
    report["clean"]["engine"]["n"] = 0
    with pytest.raises(InputError, match="no images"):
        compare([engine("before"), report])
