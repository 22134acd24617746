"""`verify` from an artifact on disk to a report, with the reference as the engine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_artifact import CLASSES, SIDE, labelled, small_graph, write_artifact

from edgeguard import files
from edgeguard.artifact import Artifact
from edgeguard.data.dataset import Dataset, from_arrays
from edgeguard.errors import InputError
from edgeguard.patch import square
from edgeguard.report import SCHEMA
from edgeguard.report.html import render_html
from edgeguard.report.read import check_report, read_report
from edgeguard.report.summary import format_summary
from edgeguard.verify import Gate, VerifyOptions, verify
from edgeguard.verify.prepare import split_images

Options = Callable[..., VerifyOptions]


@pytest.fixture(scope="module")
def report(artifact: Artifact, dataset: Dataset) -> dict[str, Any]:
    options = VerifyOptions(
        patch_sizes=(4, 6), steps=12, attack_batch=20, stride=4, placements=("random", "worst"), batch_size=16
    )
    gate = Gate(max_asr=0.01, require_integer=True)
    return verify(artifact, dataset, options, gate=gate, command=["edgeguard", "verify", "runs/a b"])


def test_follows_its_schema(report: dict[str, Any], tmp_path: Path) -> None:
    assert check_report(report) is report
    assert report["schema"] == SCHEMA
    files.write_json(tmp_path / "report.json", report)
    assert read_report(tmp_path / "report.json") == json.loads(files.to_json(report))
    assert "A-QAPA" in format_summary(report)
    assert "runs/a b" in render_html(report)


def test_one_patch_is_judged_at_every_placement(report: dict[str, Any]) -> None:
    rows = [(r["name"], r["access"], r["patch_size"], r["placement"], r["patch"]) for r in report["attacks"]]
    assert ("aqapa", "engine", 6, "random", 5) in rows
    assert ("aqapa", "engine", 6, "worst", 5) in rows
    assert len(rows) == 2 * len(report["patches"]) == 12
    by_row = {row[:4]: found for row, found in zip(rows, report["attacks"], strict=True)}
    for name, access in (("noise", "none"), ("aqapa", "transfer"), ("aqapa", "engine")):
        random, worst = (by_row[name, access, 4, placement] for placement in ("random", "worst"))
        assert worst["asr"] >= random["asr"]
        assert (random["places"], worst["places"]) == (1, 16)
    assert by_row["aqapa", "engine", 4, "random"]["queries"] >= 12 * 20
    assert by_row["aqapa", "transfer", 4, "random"]["queries"] == 0


def test_engine_and_twin_agree_bit_for_bit(report: dict[str, Any]) -> None:
    assert report["clean"]["bit_identical"] is True
    assert report["clean"]["agreement"] == 1
    assert report["clean"]["engine"]["accuracy"] == 1
    for row in report["attacks"]:
        assert row["twin_asr"] == row["asr"]
        assert row["survival"]["bit_identical"]
    assert report["survival"]["verdict"] == "survived"
    assert report["attacks"][report["survival"]["attack"]]["asr"] == max(row["asr"] for row in report["attacks"])


def test_figures_belong_together(report: dict[str, Any]) -> None:
    for row in report["attacks"]:
        assert row["ci95"][0] <= row["asr"] <= row["ci95"][1]
        assert row["n"] == 80
        assert row["robust_accuracy"] == pytest.approx(1 - row["asr"])
        assert row["seen"] is (row["patch_size"] == 4)
    assert [check["passed"] for check in report["trust"]] == [True] * 6
    assert report["gate"]["passed"] is False
    assert [rule["passed"] for rule in report["gate"]["rules"]] == [False, True]
    assert len(report["examples"]["images"]) == 6


def test_records_what_it_was_computed_from(report: dict[str, Any], artifact: Artifact, dataset: Dataset) -> None:
    assert report["artifact"]["files"] == artifact.manifest["files"]
    assert report["artifact"]["sha256"] == files.sha256(artifact.path / "manifest.json")
    assert report["data"]["sha256"] == dataset.sha256
    assert report["data"]["n"] + report["data"]["crafting"]["n"] == len(dataset)
    assert report["environment"]["command"] == ["edgeguard", "verify", "runs/a b"]
    assert report["environment"]["engine"]["runtime"] == "reference"
    assert report["options"]["steps"] == 12


def timeless(report: dict[str, Any]) -> str:
    return files.to_json({key: value for key, value in report.items() if key != "timing"})


def test_equal_arguments_give_equal_bytes(artifact: Artifact, dataset: Dataset, quick: Options) -> None:
    first, second, other = (timeless(verify(artifact, dataset, quick(steps=4, seed=seed))) for seed in (0, 0, 1))
    assert first == second
    assert other != first


def test_surrogates_are_aggregated(artifact: Artifact, dataset: Dataset, quick: Options, tmp_path: Path) -> None:
    other = write_artifact(tmp_path / "small-8", small_graph(8), "8")
    report = verify(artifact, dataset, quick(accesses=("transfer",), surrogates=(other.path,), steps=6))
    rows = [row for row in report["attacks"] if row["access"] == "transfer"]
    assert [row["source"] for row in rows] == ["4", "8", "all widths"]
    (aggregated,) = report["aggregated"]
    assert aggregated["asr"] == max(row["asr"] for row in rows)
    assert aggregated["surrogates"] == ["4", "8", "all widths"]
    with pytest.raises(InputError, match="different widths"):
        verify(artifact, dataset, quick(accesses=("transfer",), surrogates=(artifact.path,)))


def test_replays_patch_files(artifact: Artifact, dataset: Dataset, tmp_path: Path) -> None:
    square(np.full((3, 5, 3), 255, np.uint8)).save(tmp_path / "white.npz")
    options = VerifyOptions(accesses=("replay",), replay=(tmp_path / "white.npz",), limit=30)
    report = check_report(verify(artifact, dataset, options))
    (row,) = report["attacks"]
    assert (row["name"], row["access"], row["source"], row["patch_size"]) == ("replay", "replay", "white.npz", 5)
    assert row["n"] == report["data"]["n"] == 30
    assert report["data"]["crafting"] is None
    assert report["clean"]["bit_identical"]
    square(np.zeros((3, SIDE + 1, 2), np.uint8)).save(tmp_path / "large.npz")
    with pytest.raises(InputError, match=r"large\.npz.*larger than the image"):
        verify(artifact, dataset, VerifyOptions(accesses=("replay",), replay=(tmp_path / "large.npz",)))


def test_replay_works_without_torch(artifact: Artifact, dataset: Dataset, tmp_path: Path) -> None:
    square(np.full((3, 4, 4), 255, np.uint8)).save(tmp_path / "white.npz")
    images = dataset.images(np.arange(20))
    np.savez(tmp_path / "data.npz", images=images.transpose(0, 2, 3, 1), labels=dataset.labels[:20])
    program = f"""
import importlib.util, sys
sys.modules["torch"] = None
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else real(name, *rest)
from pathlib import Path
from edgeguard.artifact import Artifact
from edgeguard.data.npz import load_npz
from edgeguard.errors import MissingDependency
from edgeguard.files import to_json
from edgeguard.verify import Gate, VerifyOptions, verify
artifact, data = Artifact.load({str(artifact.path)!r}), load_npz(Path({str(tmp_path / "data.npz")!r}))
options = VerifyOptions(accesses=("replay",), replay=(Path({str(tmp_path / "white.npz")!r}),))
sys.stdout.write(to_json(verify(artifact, data, options, gate=Gate(require_survival=True))))
try:
    verify(artifact, data, VerifyOptions())
except MissingDependency as exc:
    assert "pip install" in str(exc)
else:
    raise SystemExit("crafting without torch must fail")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = check_report(json.loads(done.stdout))
    assert report["clean"]["twin"] is None
    assert report["survival"] is None
    assert report["environment"]["versions"]["torch"] is None
    assert {check["check"]: check["passed"] for check in report["trust"]} == {
        "white_box_strongest": None, "gradients_alive": None, "softmax_unsaturated": None, "large_patch_wins": None,
        "deterministic": True, "batch_one_agrees": True,
    }  # fmt: skip
    assert report["gate"]["passed"] is False
    assert "twin" in report["gate"]["rules"][0]["detail"]
    assert "not measured" in format_summary(report)
    render_html(report)


def test_crafting_and_judging_share_no_image(dataset: Dataset, quick: Options) -> None:
    split = split_images(dataset, None, quick(limit=50))
    assert len(split.judged) == 50
    assert not set(split.judged) & set(split.crafted)
    other = labelled(small_graph(), 40, seed=9)
    split = split_images(dataset, other, quick(craft_limit=25))
    assert (len(split.judged), len(split.crafted)) == (160, 25)
    copies = from_arrays("copy", dataset.images(np.arange(160)).transpose(0, 2, 3, 1), dataset.labels)
    split = split_images(dataset.subset(np.arange(100)), copies, quick())
    assert len(split.crafted) == 60
    assert set(split.crafted) == set(range(100, 160))
    with pytest.raises(InputError, match="too few images"):
        split_images(dataset.subset([0]), None, quick())


def test_craft_data_is_crafted_on(artifact: Artifact, dataset: Dataset, quick: Options) -> None:
    other = labelled(small_graph(), 40, seed=9)
    report = verify(artifact, dataset, quick(steps=2, accesses=("transfer",)), craft_data=other)
    assert report["data"]["n"] == 160
    assert report["data"]["crafting"] == {
        "name": "random", "sha256": other.sha256, "n": 40, "of": 40, "disjoint": True
    }  # fmt: skip


def test_targeted(artifact: Artifact, dataset: Dataset, quick: Options) -> None:
    target = int(np.bincount(dataset.labels).argmax())
    report = verify(artifact, dataset, quick(target=target, accesses=("engine",)))
    assert "y != t" in report["definitions"]["asr"]
    assert all(row["n"] < report["data"]["n"] and row["target"] == target for row in report["attacks"])


def test_progress_reaches_every_total(artifact: Artifact, dataset: Dataset, quick: Options) -> None:
    last: dict[str, tuple[int, int]] = {}
    verify(artifact, dataset, quick(steps=3), progress=lambda stage, done, total: last.update({stage: (done, total)}))
    assert any("crafting" in stage for stage in last)
    assert "trust checks" in last
    assert all(done == total for done, total in last.values()), last


@pytest.mark.parametrize(
    ("change", "message"),
    [({"patch_sizes": (SIDE + 1,)}, "larger than the image"), ({"target": CLASSES}, f"target {CLASSES}")],
)
def test_options_that_do_not_fit(
    artifact: Artifact, dataset: Dataset, quick: Options, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        verify(artifact, dataset, quick(**change))


def test_data_that_does_not_fit(artifact: Artifact, dataset: Dataset, quick: Options) -> None:
    small = from_arrays("small", np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4, np.int64))
    with pytest.raises(InputError, match="images of shape"):
        verify(artifact, small, quick())
    images = dataset.images(np.arange(20)).transpose(0, 2, 3, 1)
    many = from_arrays("many", images, np.arange(20))
    with pytest.raises(InputError, match="labels outside"):
        verify(artifact, many, quick())
    wrong = from_arrays("wrong", images, (dataset.labels[:20] + 1) % CLASSES)
    with pytest.raises(InputError, match="none of the 10 judged images counts"):
        verify(artifact, wrong, quick(steps=1))
