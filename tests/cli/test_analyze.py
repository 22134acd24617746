"""`edgeguard analyze` on a trained run at two widths."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_runner import Done

from edgeguard.patch import square

Program = Callable[..., Done]
FAST = ("--steps", "5", "--limit", "40", "--patch-size", "4", "--sizes", "3,5", "--opacities", "0,1", "--stride", "6")


def test_every_part(program: Program, tmp_path: Path) -> None:
    done = program("analyze", "a8", "a2", *FAST, "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document == json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert document["schema"] == "edgeguard.analysis/1"
    assert [one["name"] for one in document["artifacts"]] == ["8 bits", "2 bits"]
    (pair,) = document["alignment"]
    assert -1 <= pair["cosine"]["ci95"][0] <= pair["cosine"]["mean"] <= pair["cosine"]["ci95"][1] <= 1
    for row in document["sensitivity"]:
        assert np.shape(row["asr"]) == (len(row["rows"]), len(row["columns"])) == (3, 3)
    for row in document["visibility"]:
        assert [entry["patch_size"] for entry in row["by_size"]] == [3, 5]
        assert row["by_opacity"][0]["asr"] == 0
    rows = document["transfer"]["rows"]
    assert len(rows) == 3 * 2
    for best in document["transfer"]["aggregated"]:
        column = [row["asr"] for row in rows if row["engine"] == best["engine"] and row["surrogate"] != "random pixels"]
        assert best["asr"] == max(column)
    page = (tmp_path / "out" / "analysis.html").read_text()
    assert page.count("<svg") == 3 + 2 + 4 + 1
    assert "<script" not in page


def test_the_same_command_gives_the_same_bytes_and_a_summary(program: Program, tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        done = program("analyze", "a8", "a2", *FAST, "--what", "alignment,transfer", "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
        assert "transfer, 8 bits -> 2 bits" in done.stdout
        document = json.loads((tmp_path / name / "analysis.json").read_text())
        found.append({key: value for key, value in document.items() if key != "command"})
    assert found[0] == found[1]
    assert "sensitivity" not in found[0]


def test_a_given_patch(program: Program, tmp_path: Path) -> None:
    square(np.full((3, 7, 7), 255, np.uint8)).save(tmp_path / "white.npz")
    done = program("analyze", "a8", *FAST, "--what", "sensitivity", "--patch", tmp_path / "white.npz", "--out",
                   tmp_path / "out", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sensitivity"][0]["patch_size"] == 7


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a8", "--what", "colour"], "--what must be one or more of"),
        (["a8", "--what", "alignment"], "name at least two"),
        (["a8", "--opacities", "0,2"], "opacities lie between 0 and 1"),
        (["a8", "--opacities", "much"], "not a comma-separated list of numbers"),
        (["a8", "--patch-size", "99"], "larger than the image"),
        (["a8", "--limit", "0"], "limit must be at least 1"),
        (["missing"], "missing"),
    ],
)
def test_bad_options(program: Program, tmp_path: Path, arguments: list[str], words: str) -> None:
    done = program("analyze", *arguments, "--out", tmp_path / "out")
    assert done.returncode == 2, done.stderr
    assert words in done.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()
