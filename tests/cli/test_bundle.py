"""From the workstation to the device and back: `attack` writes a bundle, `verify --bundle` replays it without torch, and the
two reports are merged."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_runner import Done, execute
from serving import serve_artifact

from edgeguard import files
from edgeguard.report.read import read_report

Program = Callable[..., Done]
WITHOUT_TORCH = """
import importlib.util, sys
for name in ("torch", "torchvision", "brevitas", "matplotlib", "PIL"):
    sys.modules[name] = None
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] == "torch" else real(name, *rest)
from edgeguard.cli import main
sys.argv[0] = "edgeguard"
main()
"""
KINDS = "a-qapa,gap,a-qapa-per-image,lavan,patch-rs,patch-rs-per-image"


def on_the_device(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `edgeguard ARGUMENTS` in an interpreter that has neither torch nor anything that draws."""
    command = [sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def station(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `a2`, `bundle` of every kind of attack, and `here`, the report of its replay on this machine."""
    folder = tmp_path_factory.mktemp("station")
    for name in ("a2", "a8"):
        shutil.copytree(workspace / name, folder / name)
    made = execute(
        folder, "attack", "a2", "--attack", KINDS, "--patch-size", "4", "--steps", "6", "--queries", "200", "--image-queries", "20",
        "--limit", "60", "--judge-limit", "50", "--per-image-limit", "12", "--seed", "3", "--out", "bundle",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    done = execute(folder, "verify", "a2", "--bundle", "bundle", "--placement", "random,worst", "--out", "here")
    assert done.returncode == 0, done.stderr
    return folder


def rates(report: Any) -> list[Any]:
    keys = ("name", "access", "scope", "patch_size", "placement", "source", "asr", "ci95", "n", "robust_accuracy", "robust_n")
    return [[row[key] for key in keys] for row in report["attacks"]]


def test_what_a_bundle_holds(station: Path) -> None:
    document = json.loads((station / "bundle/bundle.json").read_text())
    assert document["data"]["n"] == 50
    assert document["seed"] == 3
    assert document["artifact"]["sha256"] == files.sha256(station / "a2/manifest.json")
    assert [(one["attack"], one["height"]) for one in document["patches"]] == [(name, 4) for name in KINDS.split(",")]
    assert set(document["files"]) == {"images.npz", *(one["file"] for one in document["patches"])}
    universal = [one["file"] for one in document["patches"] if one["attack"] in ("a-qapa", "gap", "patch-rs")]
    assert sorted(path.name for path in (station / "bundle").glob("*.pdf")) == sorted(n.replace("npz", "pdf") for n in universal)
    with np.load(station / "bundle/images.npz") as images:
        assert images["indices"].shape == images["labels"].shape == (50,)


def test_the_device_replays_it_without_torch(station: Path) -> None:
    """Every patch, those of single images included, gets the rates that it has on the workstation."""
    done = on_the_device(station, "verify", "a2", "--bundle", "bundle", "--placement", "random,worst", "--out", "there")
    assert done.returncode == 0, done.stderr
    here, there = read_report(station / "here/report.json"), read_report(station / "there/report.json")
    assert rates(here) == rates(there)
    assert {row["access"] for row in there["attacks"]} == {"replay"}
    assert {row["n"] for row in there["attacks"] if row["scope"] == "per-image"} <= set(range(1, 13))
    assert len(there["attacks"]) == 3 * 2 + 3
    assert there["environment"]["versions"]["torch"] is None
    assert there["clean"]["twin"] is None
    assert here["clean"]["twin"] is not None
    assert here["bundle"] == there["bundle"]
    assert here["data"]["judged_sha256"] == there["data"]["judged_sha256"]


def test_what_attack_crafts_is_what_verify_crafts(station: Path) -> None:
    """The same images to judge and to craft on, and so the same patch and rate."""
    options = ("--attack", "a-qapa", "--access", "engine", "--patch-size", "4", "--steps", "6", "--limit", "50", "--seed", "3")
    assert execute(station, "verify", "a2", *options, "--placement", "random", "--out", "crafted").returncode == 0
    assert execute(station, "attack", "a2", *options[:-4], "--judge-limit", "50", "--seed", "3", "--out", "one").returncode == 0
    assert execute(station, "verify", "a2", "--bundle", "one", "--placement", "random", "--out", "replayed").returncode == 0
    crafted, replayed = (read_report(station / name / "report.json") for name in ("crafted", "replayed"))
    assert crafted["data"]["judged_sha256"] == replayed["data"]["judged_sha256"]
    row = next(row for row in crafted["attacks"] if row["access"] == "engine")
    assert crafted["patches"][row["patch"]]["sha256"] == replayed["patches"][0]["sha256"]
    assert (row["asr"], row["n"]) == (replayed["attacks"][0]["asr"], replayed["attacks"][0]["n"])


def test_a_served_engine_replays_it(station: Path, tmp_path: Path) -> None:
    with serve_artifact(station / "a2", tmp_path) as server:
        done = on_the_device(station, "verify", server.url, "--data", "digits", "--bundle", "bundle", "--out", tmp_path / "far")
        assert done.returncode == 0, done.stderr
        options = ("--attack", "patch-rs", "--access", "replay,query", "--universal-queries", "200", "--patch-size", "4")
        more = on_the_device(station, "verify", server.url, "--data", "digits", "--bundle", "bundle", *options, "--out",
                             tmp_path / "more")  # fmt: skip
        assert more.returncode == 0, more.stderr
    with serve_artifact(station / "a8", tmp_path) as server:
        other = execute(station, "verify", server.url, "--data", "digits", "--bundle", "bundle", "--out", tmp_path / "other")
        assert other.returncode == 2
        assert "the bundle was made for the artifact 'a2'" in other.stderr
    far = read_report(tmp_path / "far/report.json")
    here = read_report(station / "here/report.json")
    kept = [row for row in rates(here) if row[4] != "worst"]
    assert [row for row in rates(far) if row[4] != "worst"] == kept
    accesses = [row["access"] for row in read_report(tmp_path / "more/report.json")["attacks"]]
    assert {"replay", "query"} <= set(accesses)


def test_an_engine_built_elsewhere_of_the_same_integers_replays_it(workspace: Path, station: Path, tmp_path: Path) -> None:
    """As a TensorRT plan is: another target and another manifest, and the integer graph of the bundle."""
    built = execute(workspace, "export", "run", "--bits", "2", "--target", "ort-legacy", "--out", tmp_path / "built")
    assert built.returncode == 0, built.stderr
    assert files.sha256(tmp_path / "built/manifest.json") != files.sha256(station / "a2/manifest.json")
    places = ("--placement", "random,worst")
    done = on_the_device(station, "verify", tmp_path / "built", "--bundle", "bundle", *places, "--out", tmp_path / "local")
    assert done.returncode == 0, done.stderr
    with serve_artifact(tmp_path / "built", tmp_path) as server:
        options = ("--data", "digits", "--bundle", "bundle", *places, "--out", tmp_path / "far")
        done = on_the_device(station, "verify", server.url, *options)
        assert done.returncode == 0, done.stderr
    here = read_report(station / "here/report.json")
    for name in ("local", "far"):
        assert rates(read_report(tmp_path / name / "report.json")) == rates(here)
    merged = execute(station, "report", "--merge", "here", tmp_path / "local", tmp_path / "far", "--json")
    assert merged.returncode == 0, merged.stderr
    document = json.loads(merged.stdout)
    executed = [one["executes"] for one in document["sources"]]
    assert executed == ["a2, ort", "built, ort-legacy", "built, ort-legacy, as the server says"]
    assert len({one["artifact_sha256"] for one in document["sources"]}) == 2
    assert document["artifact"]["graph_sha256"] == files.sha256(tmp_path / "built/graph.npz")
    assert all(group["equal"] and len(group["cells"]) == 3 for group in document["side_by_side"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a8", "--bundle", "bundle"], "not of one integer graph; replay its patch files"),
        (["a2", "--bundle", "bundle", "--limit", "5"], "a bundle says which images are judged"),
        (["a2", "--bundle", "bundle", "--seed", "4"], "the bundle is of target None and seed 3, got None and 4"),
        (["a2", "--bundle", "bundle", "--target", "1"], "leave --target and --seed out"),
        (["a2", "--bundle", "bundle", "--access", "query", "--attack", "patch-rs"], "'replay' and patch files to replay go"),
        (["a2", "--bundle", "a2"], "a2 is not a bundle: it has no bundle.json"),
        (["a2", "--bundle", "nowhere"], "nowhere is not a bundle"),
    ],
)
def test_bundles_that_do_not_fit(station: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    done = execute(station, "verify", *arguments, "--out", tmp_path / "out")
    assert done.returncode == 2, done.stderr
    assert words in done.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_other_data_are_refused(station: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "other.npz", images=rng.integers(0, 256, (600, 16, 16, 3), np.uint8), labels=rng.integers(0, 10, 600))
    other = f"npz:{tmp_path / 'other.npz'}"
    done = execute(station, "verify", "a2", "--bundle", "bundle", "--data", other, "--out", tmp_path / "o")
    assert done.returncode == 2
    assert "holds others: 600 of" in done.stderr


def changed(folder: Path, name: str, **arrays: Any) -> None:
    """Write other arrays into a file of a bundle, and their hash into the document, as its maker could."""
    np.savez(folder / name, **arrays)
    document = json.loads((folder / "bundle.json").read_text())
    document["files"][name] = files.sha256(folder / name)
    (folder / "bundle.json").write_text(json.dumps(document))


INDICES, LABELS = np.arange(50), np.zeros(50, np.int64)
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a byte": (lambda b: (b / "images.npz").write_bytes((b / "images.npz").read_bytes()[:-1] + b"x"), "was changed after"),
    "a file": (lambda b: (b / "patch-1.npz").unlink(), "'patch-1.npz' is missing"),
    "a link": (lambda b: ((b / "patch-1.npz").rename(b / "x"), (b / "patch-1.npz").symlink_to(b / "x")), "not a plain file"),
    "indices": (lambda b: changed(b, "images.npz", indices=INDICES - 1, labels=LABELS), "'indices' run from -1"),
    "an image twice": (lambda b: changed(b, "images.npz", indices=INDICES // 2, labels=LABELS), "names an image twice"),
    "types": (lambda b: changed(b, "images.npz", indices=INDICES / 1, labels=LABELS), "must hold 'indices'"),
    "labels": (lambda b: changed(b, "images.npz", indices=INDICES, labels=LABELS + 10), "'labels' run from 10"),
    "other labels": (lambda b: changed(b, "images.npz", indices=INDICES, labels=LABELS), "are not those of the bundle"),
    "pixels": (lambda b: changed(b, "patch-1.npz", pixels=np.zeros((3, 4, 5), np.uint8), mask=np.ones((4, 4), bool)), "4x4, uint8"),
    "mask": (lambda b: changed(b, "patch-1.npz", pixels=np.zeros((3, 4, 4), np.uint8), mask=np.zeros((4, 4), bool)), "all False"),
    "another patch": (
        lambda b: changed(b, "patch-1.npz", pixels=np.zeros((3, 4, 4), np.uint8), mask=np.ones((4, 4), bool)),
        "is not the patch that bundle.json describes",
    ),
    "a number beyond every float": (
        lambda b: (b / "bundle.json").write_text((b / "bundle.json").read_text().replace('"seed": 3', f'"seed": {10**400}')),
        "bundle.json.seed must be from 0 to 9.22337e+18, got one of 1329 bits",
    ),
    "no places": (
        lambda b: changed(b, "patch-3.npz", pixels=np.zeros((12, 3, 4, 4), np.uint8), mask=np.ones((4, 4), bool)),
        "a patch and a place for each",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_bundles_that_are_damaged(station: Path, tmp_path: Path, name: str) -> None:
    damage, words = DAMAGES[name]
    shutil.copytree(station / "bundle", tmp_path / "bundle")
    damage(tmp_path / "bundle")
    done = execute(station, "verify", "a2", "--bundle", tmp_path / "bundle", "--out", tmp_path / "out")
    assert done.returncode == 2, done.stderr
    assert words in done.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_the_two_reports_merge(station: Path, tmp_path: Path) -> None:
    """On the device, too; and what its own search through queries found stands beside it, as of another access."""
    options = ("--attack", "patch-rs", "--access", "replay,query", "--universal-queries", "200", "--patch-size", "4")
    done = on_the_device(station, "verify", "a2", "--bundle", "bundle", *options, "--placement", "random", "--out", tmp_path / "b")
    assert done.returncode == 0, done.stderr
    merged = on_the_device(station, "report", "--merge", "here", tmp_path / "b/report.json", "--out", tmp_path / "m", "--json")
    assert merged.returncode == 0, merged.stderr
    document = json.loads(merged.stdout)
    assert document == json.loads((tmp_path / "m/merged.json").read_text())
    here, there = (read_report(path / "report.json") for path in (station / "here", tmp_path / "b"))
    assert [one["twin"] for one in document["sources"]] == [True, False]
    assert [(cell["source"], cell["asr"], cell["ci95"], cell["n"]) for cell in document["cells"]] == [
        (letter, row["asr"], row["ci95"], row["n"]) for letter, report in (("A", here), ("B", there)) for row in report["attacks"]
    ]
    made = {cell["file"]: cell["crafted"]["access"] for cell in document["cells"] if cell["access"] == "replay"}
    assert made["patch-1.npz"] == "engine"
    assert made["patch-6.npz"] == "query"
    assert {cell["access"] for cell in document["cells"] if cell["source"] == "B"} == {"none", "replay", "query"}
    assert len(document["side_by_side"]) == 6
    assert all(group["equal"] for group in document["side_by_side"])
    page = (tmp_path / "m/merged.html").read_text()
    assert "Nothing is averaged" in page
    shown = execute(station, "report", "--merge", "here", tmp_path / "b", "--html", tmp_path / "only.html")
    assert shown.returncode == 0, shown.stderr
    assert (tmp_path / "only.html").read_text() == page
    assert "6 measures, 6 with the same count" in shown.stdout


def test_reports_that_are_not_of_one_thing(station: Path, tmp_path: Path) -> None:
    small = ("--attack", "a-qapa", "--access", "transfer", "--patch-size", "4", "--steps", "3", "--placement", "random")
    made = {
        "other images": ("a2", *small, "--limit", "30"),
        "other artifact": ("a8", *small, "--limit", "50", "--seed", "3"),
        "other patches": ("a2", *small, "--limit", "50", "--seed", "3"),
    }
    words = {
        "other images": "were judged on different images", "other artifact": "not of one integer graph: a8 of SHA-256",
        "other patches": "and report B does not hold it: they are of different patches",
    }  # fmt: skip
    for name, arguments in made.items():
        assert execute(station, "verify", *arguments, "--out", tmp_path / name).returncode == 0
        done = execute(station, "report", "--merge", "here", tmp_path / name, "--out", tmp_path / "m")
        assert done.returncode == 2, done.stdout
        assert words[name] in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert not (tmp_path / "m").exists()
    done = execute(station, "report", "--merge", "here", "--out", tmp_path / "m")
    assert done.returncode == 2
    assert "of 2 to 26 reports, got 1" in done.stderr
    done = execute(station, "report", "--merge", "here", tmp_path / "other images", "--junit", tmp_path / "j.xml")
    assert done.returncode == 2
    assert "--junit is of single reports" in done.stderr
