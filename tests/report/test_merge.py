"""Merging without running anything: what is kept, what is put side by side, what is refused."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
from report_example import attack, example_report

from edgeguard.errors import InputError
from edgeguard.report.merge import merge
from edgeguard.report.merge_page import format_merged, render_merged


def device(**changes: Any) -> dict[str, Any]:
    """A report of the same artifact and images elsewhere: the first patch replayed, and a search through queries."""
    report = example_report(**changes)
    report["environment"] = {**report["environment"], "platform": "Linux-aarch64", "engine": {"runtime": "ort", "version": "1.27"}}
    report["attacks"] = [
        attack(0.5, name="aqapa", access="replay", source="patch.npz", twin_asr=None, survival=None, steps=None),
        attack(0.6, name="patch-rs", access="query", source=None, patch=None, scope="per-image", twin_asr=None, survival=None),
    ]
    report["bundle"] = {
        "sha256": "aa" * 32,
        "patches": [{"file": "patch.npz", "attack": "a-qapa", "access": "engine", "source": "4", "sha256": "01" * 32}],
    }
    report["clean"]["twin"] = report["survival"] = None
    report["timing"]["attacks"] = [1.0, 2.0]
    return report


def test_every_rate_keeps_what_it_is_of() -> None:
    station, board = example_report(), device()
    document = merge([station, board])
    cells = document["cells"]
    assert [(cell["source"], cell["access"], cell["asr"], cell["n"]) for cell in cells] == [
        ("A", "engine", 0.45, 90), ("A", "transfer", 0.3, 90), ("A", "engine", 0.35, 90), ("B", "replay", 0.5, 90),
        ("B", "query", 0.6, 90),
    ]  # fmt: skip
    assert all(cell["ci95"] and cell["robust_ci95"] and cell["robust_n"] for cell in cells)
    assert cells[3]["crafted"] == {"access": "engine", "source": "4"}
    assert [one["machine"] for one in document["sources"]] == ["Linux", "Linux-aarch64"]
    assert [one["engine"] for one in document["sources"]] == ["ort", "ort 1.27"]
    assert document["side_by_side"] == [{"cells": [0, 3], "equal": False}], "one patch, 40 and 45 of 90"
    assert document["highest"] == 4
    assert document["definitions"]["asr"] == [{"words": station["definitions"]["asr"], "sources": ["A", "B"]}]
    rates = {cell["asr"] for cell in cells}
    assert {row["asr"] for report in (station, board) for row in report["attacks"]} == rates, "no rate that nobody measured"


def test_the_page_and_the_text() -> None:
    board = device()
    board["artifact"]["remote"] = {"url": "http://b:1/v2/models/<m>", "server": "s", "platform": "p", "claims": {}, "twin": False,
                                   "claims_twins_artifact": False}  # fmt: skip
    board["status"] = {"complete": False, "reason": "it died <here>"}
    board["skipped"] = [{"attack": "gap", "reason": "no twin"}]
    document = merge([example_report(), board])
    page, words = render_merged(document), format_merged(document)
    for part in ("patch.npz, crafted", "at engine access on 4", "50.0 %", "45 of 90", "Linux-aarch64", "another count"):
        assert part in page
    assert "<m>" not in page
    assert "<here>" not in page
    assert "the server http://b:1/v2/models/<m>, asked from Linux-aarch64" in words
    assert "incomplete: it died" in words
    assert "not tried: gap; no twin" in words
    assert "Highest ASR: 60.0 % (55.0 to 65.0 %, n = 90)" in words
    assert "1 measure, 0 with the same count" in words


def changed(where: tuple[Any, ...], value: Any) -> dict[str, Any]:
    report = copy.deepcopy(device())
    inner: Any = report
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    return report


def on_a_server(claims: dict[str, str]) -> dict[str, Any]:
    """With a twin; claims: what the server says that it executes."""
    report = device()
    report["artifact"]["remote"] = {
        "url": "http://b:1/v2/models/m", "server": "s", "platform": "p", "claims": claims, "twin": True,
        "claims_twins_artifact": claims.get("artifact_sha256") == report["artifact"]["sha256"],
    }  # fmt: skip
    return report


def with_graph(report: dict[str, Any], graph: str = "77" * 32) -> dict[str, Any]:
    report["artifact"]["files"] = {"graph.npz": graph}
    return report


def test_what_a_server_says_that_it_executes_counts() -> None:
    said = merge([example_report(), on_a_server({"artifact_sha256": "cd" * 32, "target": "ort"})])
    assert [one["executes"] for one in said["sources"]] == ["resnet20-w4, ort", "m, ort, as the server says"]
    silent = merge([example_report(), on_a_server({})])
    assert silent["sources"][1]["executes"] == "a server that does not say what it executes, with the twin resnet20-w4"
    assert [one["artifact_sha256"] for one in silent["sources"]] == ["cd" * 32, "unknown"]
    assert [one["twin_sha256"] for one in silent["sources"]] == [None, "cd" * 32]
    assert "Twin of report B, SHA-256 of its manifest" in render_merged(silent)
    for words in (render_merged(silent), format_merged(silent)):
        assert "a server that does not say what it executes, with the twin resnet20-w4" in words


def test_a_server_of_another_artifact_has_not_its_twins_graph() -> None:
    station, other = with_graph(example_report()), with_graph(on_a_server({"artifact_sha256": "ee" * 32}))
    with pytest.raises(InputError, match="are of different artifacts, and it is not known of both which integer graph they hold"):
        merge([station, other])
    own = with_graph(on_a_server({"artifact_sha256": "cd" * 32}))
    built = with_graph(device())
    built["artifact"]["sha256"] = "ee" * 32
    assert len(merge([built, own])["sources"]) == 2, "the twin's own artifact has the twin's graph"


def test_artifacts_of_one_integer_graph_are_one_model() -> None:
    station, built = with_graph(example_report()), with_graph(device())
    built["artifact"] |= {"name": "resnet20-w4-plan", "target": "trt", "sha256": "ee" * 32}
    served = on_a_server({"artifact_sha256": "dd" * 32, "graph_sha256": "77" * 32, "target": "openvino"})
    document = merge([station, built, served])
    assert document["artifact"]["graph_sha256"] == "77" * 32
    assert [one["artifact_sha256"] for one in document["sources"]] == ["cd" * 32, "ee" * 32, "dd" * 32]
    name = "resnet20-w4, ort; resnet20-w4-plan, trt; m, openvino, as the server says; 4 bit"
    assert name in format_merged(document)
    assert f"<h1>{name}</h1>" in render_merged(document)
    with pytest.raises(InputError, match="and not of one integer graph: resnet20-w4-plan of SHA-256 ee"):
        merge([station, with_graph(built, "78" * 32)])


def test_the_order_of_reports_does_not_matter() -> None:
    """One that names the artifact alone, as servers of before do, joins those that name the graph as well."""
    station, built = with_graph(example_report()), with_graph(device())
    built["artifact"]["sha256"] = "ee" * 32
    old = on_a_server({"artifact_sha256": "cd" * 32})
    old["artifact"] |= {"sha256": "99" * 32, "files": {}}
    for reports in itertools.permutations([station, built, old]):
        assert merge(list(reports))["artifact"]["graph_sha256"] == "77" * 32
    with pytest.raises(InputError, match="it is not known of both"):
        merge([built, old])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another artifact": (changed(("artifact", "sha256"), "ee" * 32), "report B and report A are of different artifacts, and it"),
    "an unknown artifact": (changed(("artifact", "sha256"), "unknown"), "report B is of a server that does not say"),
    "other data": (changed(("data", "sha256"), "ee" * 32), "were judged on different images"),
    "fewer images": (changed(("data", "n"), 99), "were judged on different images"),
    "another seed": (changed(("environment", "seed"), 8), "were judged on different images"),
    "another definition": (changed(("definitions", "asr"), "ASR = t"), "define asr differently"),
    "another patch": (
        changed(("bundle", "patches", 0, "sha256"), "ee" * 32),
        "report B replays the patch of SHA-256 eeeeeeeeeeee..., and report A",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_of_one_thing_is_refused(name: str) -> None:
    report, words = REFUSED[name]
    with pytest.raises(InputError, match=words.replace(".", r"\.")):
        merge([example_report(), report])


def test_the_images_decide_where_both_name_them() -> None:
    one, two = example_report(), changed(("environment", "seed"), 8)
    for report in (one, two):
        report["data"]["judged_sha256"] = "dd" * 32
    assert merge([one, two])["data"]["n"] == 100
    two["data"]["judged_sha256"] = "ee" * 32
    with pytest.raises(InputError, match="different images"):
        merge([one, two])


def test_without_replays_any_patches_stand_beside_each_other() -> None:
    other = example_report()
    other["environment"]["platform"] = "elsewhere"
    for number, block in enumerate(other["patches"]):
        block["sha256"] = f"{number}f" * 32
    document = merge([example_report(), other])
    assert document["side_by_side"] == []
    assert len(document["cells"]) == 6
