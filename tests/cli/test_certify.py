"""`edgeguard certify`, on a small artifact, from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import pytest
from command_runner import execute
from small_artifact import SIDE, small_graph, write_artifact

from edgeguard.artifact import Artifact
from edgeguard.certify import Defended, MaskSet
from edgeguard.patch import apply_patch, grid_positions, square
from edgeguard.targets import open_engine
from edgeguard.targets.reference import ReferenceEngine

Outcome = tuple[int, str, str]
Program = Callable[..., Outcome]
COUNT = 12
COMMON = ("--data", "npz:images.npz", "--masks", "8", "--batch-size", "16")


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Program:
    """Runs the program in a folder with `a`, `images.npz` and two patches: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    graph = small_graph()
    write_artifact(tmp_path / "a", graph, "4")
    # Nearly flat images: some keep their label behind two masks, others do not.
    noise = graphs.random_images(graph.input_shape, COUNT, 5).astype(int)
    images = (100 + 10 * np.arange(COUNT)[:, None, None, None] // 3 + noise // 8).astype(np.uint8)
    labels = ReferenceEngine(graph)(images).argmax(1).astype(np.int64)
    np.savez(tmp_path / "images.npz", images=images.transpose(0, 2, 3, 1), labels=labels)
    square(np.full((3, 2, 2), 255, np.uint8)).save(tmp_path / "white.npz")
    square(np.zeros((3, 6, 6), np.uint8)).save(tmp_path / "large.npz")

    def run(*arguments: object) -> Outcome:
        done = execute(tmp_path, *arguments)
        return done.returncode, done.stdout, done.stderr

    return run


def in_order(tmp_path: Path, document: dict[str, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    arrays = np.load(tmp_path / "images.npz")
    order = np.random.default_rng(document["data"]["seed"]).permutation(COUNT)[: document["n"]]
    return np.ascontiguousarray(arrays["images"][order].transpose(0, 3, 1, 2)), arrays["labels"][order]


def test_a_certificate_with_its_checks(program: Program, tmp_path: Path) -> None:
    options = ("--patch-size", "2x3", "--limit", "10", "--patch", "white.npz", "--attack-check", "--attack-places", "2")
    code, out, err = program("certify", "a", *COMMON, *options, "--json", "--out", "c")
    assert code == 0, err
    document = json.loads(out)
    assert json.loads((tmp_path / "c" / "certificate.json").read_text()) == document
    assert document["schema"] == "edgeguard.certificate/1"
    assert document["patch_size"] == [2, 3]
    assert document["masks"]["size"] == [3, 4]
    assert document["clean"]["accuracy"] == 1.0
    artifact = Artifact.load(tmp_path / "a")
    images, labels = in_order(tmp_path, document)
    with open_engine(artifact) as engine:
        answers = Defended(engine, MaskSet.of((SIDE, SIDE), (2, 3), 8)).answer(images, labels)
        robust = np.ones(len(images), bool)
        for place in grid_positions((SIDE, SIDE), (2, 2), 1):
            white = np.full((3, 2, 2), 255, np.uint8)
            patched = apply_patch(images, white, np.ones((2, 2), bool), np.tile(place, (len(images), 1)))
            robust &= engine(patched).argmax(1) == labels
    certified = int(answers.certified.sum())
    assert 0 < certified < 10
    assert document["certified"]["correct"] == certified
    low, high = document["certified"]["ci95"]
    assert 0 < low < certified / 10 < high < 1
    assert document["defended"]["correct"] == (answers.labels == labels).sum()
    (place,) = document["every_place"]
    assert (place["file"], place["correct"], place["places"]) == ("white.npz", robust.sum(), 15 * 15)
    assert document["attack_check"] == {
        "patches": ["white.npz", "noise"], "places": 2, "seed": 0, "attacked": 2 * 2 * certified, "contradictions": 0,
    }  # fmt: skip


def test_the_summary_and_other_masks(program: Program, tmp_path: Path) -> None:
    code, out, err = program("certify", "a", *COMMON, "--patch-size", "2", "--limit", "5", "--fill", "1,2,3", "--out", "c")
    assert code == 0, err
    assert "any patch of at most 2x2 pixels" in out
    assert "certified" in out
    document = json.loads((tmp_path / "c" / "certificate.json").read_text())
    assert (document["masks"]["fill"], document["attack_check"], document["every_place"]) == ([1, 2, 3], None, [])
    assert document["n"] == 5


def test_an_inconsistent_engine_contradicts_its_certificate(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine whose answers change once the proof is done breaks what was proven, and the check says so."""
    honest, seen = ReferenceEngine.__call__, [0]

    def fickle(self: ReferenceEngine, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        logits = honest(self, images)
        seen[0] += len(images)
        return np.roll(logits, 1, axis=1) if seen[0] > limit else logits

    limit = 1 << 40
    monkeypatch.setattr(ReferenceEngine, "__call__", fickle)
    options = ("--patch-size", "2", "--limit", "6", "--attack-places", "1")
    code, out, _ = program("certify", "a", *COMMON, *options, "--json", "--out", "c")
    assert code == 0
    assert json.loads(out)["certified"]["correct"] > 0
    limit, seen[0] = seen[0], 0
    code, out, err = program("certify", "a", *COMMON, *options, "--attack-check", "--json", "--out", "d")
    assert code == 1
    assert json.loads(out)["attack_check"]["contradictions"] > 0
    assert "the certificate is contradicted" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--patch-size", "16"), "hide the whole image"),
        (("--patch-size", "17"), "larger than the image"),
        (("--patch-size", "2x3x4"), "neither a side"),
        (("--patch-size", "two"), "comma-separated list"),
        (("--patch-size", "0"), "at least 1"),
        (("--masks", "0"), "at least 1"),
        (("--fill", "1,2"), "neither a grey level"),
        (("--fill", "300"), "0 to 255"),
        (("--limit", "-1"), "must be 0 or more"),
        (("--patch", "missing.npz"), "missing.npz"),
        (("--patch", "white.npz", "--patch", "white.npz"), "two patch files have one name"),
        (("--patch-size", "3", "--patch", "large.npz", "--attack-check"), "raise --patch-size"),
        (("--data", "npz:none.npz"), "none.npz"),
    ],
)
def test_wrong_options(program: Program, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    code, out, err = program("certify", "a", *COMMON, *options, "--out", "c")
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "c").exists()
