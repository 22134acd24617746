"""`edgeguard attack`, and `verify` with what it wrote and with every kind of attack."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_runner import Done

from edgeguard.files import sha256
from edgeguard.patch import Patch
from edgeguard.patch_files import load_patch

Program = Callable[..., Done]


@pytest.mark.parametrize(
    ("arguments", "plan"),
    [
        (["--steps", "6", "--limit", "60"], "a-qapa 4x4, engine"),
        (["--steps", "6", "--surrogate", "a8", "--access", "transfer", "--rotation", "20"], "a-qapa 4x4, transfer from all widths"),
        (["--attack", "patch-rs", "--queries", "300", "--target", "3"], "patch-rs 4x4, query"),
        (["--attack", "gap", "--steps", "6"], "gap 4x4, engine"),
        (["--steps", "6", "--optimizer", "adam", "--noise", "4", "--brightness", "8"], "a-qapa 4x4, engine"),
    ],
)  # fmt: skip
def test_writes_a_patch_to_replay_and_to_print(program: Program, tmp_path: Path, arguments: list[str], plan: str) -> None:
    out = tmp_path / "patch"
    done = program("attack", "a2", *arguments, "--patch-size", "4", "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document == json.loads((out / "bundle.json").read_text())
    assert document["schema"] == "edgeguard.bundle/1"
    (made,) = document["patches"]
    assert f"{made['attack']} {made['height']}x{made['width']}, {made['access']}" in plan
    assert (made["source"] == "all widths") == plan.endswith("all widths")
    assert document["files"]["patch.npz"] == sha256(out / "patch.npz")
    patch, png = Patch.load(out / "patch.npz"), load_patch(out / "patch.png")
    assert (patch.pixels[:, patch.mask] == png.pixels[:, png.mask]).all()
    assert (patch.mask == png.mask).all()
    assert (out / "patch.pdf").read_bytes().startswith(b"%PDF")


def test_the_patch_can_be_replayed(program: Program, tmp_path: Path) -> None:
    assert program("attack", "a2", "--steps", "6", "--patch-size", "4", "--out", tmp_path / "p").returncode == 0
    rates = []
    for name in ("patch.npz", "patch.png"):
        done = program("verify", "a2", "--patch", tmp_path / "p" / name, "--limit", "60", "--out", tmp_path / name, "--json")
        assert done.returncode == 0, done.stderr
        (row, *_) = json.loads(done.stdout)["attacks"]
        rates.append(row["asr"])
    assert rates[0] == rates[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--attack", "pgd"], "unknown attack 'pgd'"),
        (["--attack", "patch-rs", "--access", "engine"], "add the access 'query'"),
        (["--attack", "patch-rs", "--queries", "300", "--rotation", "10"], "cannot craft for rotation_degrees"),
        (["--optimizer", "lbfgs"], "unknown optimizer 'lbfgs'"),
        (["--attack", "patch-rs", "--queries", "300", "--optimizer", "adam"], "cannot craft for adam"),
        (["--rotation", "400"], "rotation_degrees must be between 0 and 180"),
        (["--patch-size", "99"], "larger than the image"),
        (["--side-mm", "0"], "0"),
    ],
)
def test_bad_options(program: Program, tmp_path: Path, arguments: list[str], words: str) -> None:
    done = program("attack", "a2", "--steps", "2", *arguments, "--out", tmp_path / "p")
    assert done.returncode == 2, done.stderr
    assert words in done.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "p").exists()


def test_every_kind_of_attack_and_the_baseline(program: Program, tmp_path: Path) -> None:
    wanted = "a-qapa,a-qapa-per-image,gap,lavan,patch-rs,patch-rs-per-image"
    options = ["--attack", wanted, "--patch-size", "4", "--steps", "10", "--limit", "30", "--per-image-limit", "10",
               "--queries", "40", "--universal-queries", "300", "--placement", "random"]  # fmt: skip
    done = program("verify", "a2", *options, "--out", tmp_path / "one", "--json")
    assert done.returncode == 0, done.stderr
    assert "attacks to craft" in done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert {row["access"] for row in report["attacks"]} == {"none", "transfer", "engine", "query"}
    assert not list(tmp_path.glob("*.unfinished"))
    again = program("verify", "a2", *options, "--baseline", tmp_path / "one" / "report.json", "--out", tmp_path / "two", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["gate"]["rules"][0]["rule"] == "no_regression"
    for row in report["attacks"]:
        row["asr"], row["n"] = 0.0, 1000
    (tmp_path / "better.json").write_text(json.dumps(report))
    worse = program("verify", "a2", *options, "--baseline", tmp_path / "better.json", "--out", tmp_path / "three")
    assert worse.returncode == 1
    assert "no_regression" in worse.stderr


def test_after_an_interruption_the_same_command_goes_on(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeguard.verify import run

    options = ["--budget", "quick", "--patch-size", "4", "--steps", "5", "--limit", "30", "--out", tmp_path / "r"]
    monkeypatch.setattr(run.trust, "run_all", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert program("verify", "a2", *options).returncode == 130
    unfinished = tmp_path / "r.unfinished"
    assert list(unfinished.iterdir())
    assert not (tmp_path / "r").exists()
    monkeypatch.undo()
    done = program("verify", "a2", *options)
    assert done.returncode == 0, done.stderr
    assert "going on with what is finished" in done.stderr
    assert (tmp_path / "r" / "report.json").is_file()
    assert not unfinished.exists()
