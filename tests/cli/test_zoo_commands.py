"""`edgeguard harden --list` and `zoo:NAME` in place of a run, with a model packed from the shared hardened run."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from command_runner import Done

from edgeguard import zoo
from edgeguard.run import Run

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "make_zoo.py"
NAME = "resnet8-digits-qadtr"
Program = Callable[..., Done]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_zoo", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of ready models, empty."""
    monkeypatch.setattr(zoo, "MODELS", tmp_path / "models")
    return tmp_path / "models"


def pack(script: ModuleType, workspace: Path, models: Path, *reports: Path) -> None:
    script.pack(Run.load(workspace / "run"), script.Packing(NAME, "Tries things out.", reports), models)


def test_no_models_is_one_sentence(program: Program, models: Path) -> None:
    done = program("harden", "--list")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    assert "without ready hardened models" in done.stdout
    document = json.loads(program("harden", "--list", "--json").stdout)
    assert document == {"schema": "edgeguard.zoo-list/1", "models": []}


def test_from_the_list_to_a_verified_engine(
    program: Program, script: ModuleType, workspace: Path, models: Path, tmp_path: Path
) -> None:
    pack(script, workspace, models)
    listed = program("harden", "--list").stdout
    assert "not measured" in listed
    assert "simulation" in listed
    (command,) = (line.split("use: edgeguard ")[1].split() for line in listed.splitlines() if "use:" in line)
    (after,) = (line.split("edgeguard ")[1].split() for line in listed.splitlines() if "edgeguard verify" in line)
    assert command[:2] == ["export", f"zoo:{NAME}"]
    done = program(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    fast = ["--steps", "5", "--limit", "40", "--patch-size", "4", "--out", "report"]
    done = program(*after, *fast, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["clean"]["bit_identical"] is True
    assert {row["seen"] for row in report["attacks"]} >= {True}


def test_a_packed_model_exports_the_same_bytes(
    program: Program, script: ModuleType, workspace: Path, models: Path, tmp_path: Path
) -> None:
    pack(script, workspace, models)
    for bits in ("8", "2"):
        done = program("export", f"zoo:{NAME}", "--bits", bits, "--out", tmp_path / bits, "--json")
        assert done.returncode == 0, done.stderr
        for name in ("model.onnx", "graph.npz"):
            assert (tmp_path / bits / name).read_bytes() == (workspace / f"a{bits}" / name).read_bytes()
    slim, whole = ((folder / "checkpoint.safetensors").stat().st_size for folder in (models / NAME, workspace / "run"))
    assert slim < 0.7 * whole
    done = program("export", f"zoo:{NAME}", "--bits", "2", cwd=tmp_path)
    assert f"artifact: runs/{NAME}-ort-2" in done.stdout


def test_the_list_names_the_worst_attack(
    program: Program, script: ModuleType, workspace: Path, models: Path, tmp_path: Path
) -> None:
    fast = ["--budget", "quick", "--steps", "5", "--limit", "40", "--patch-size", "3,6", "--access", "engine"]
    assert program("verify", "a2", *fast, "--out", tmp_path / "report").returncode == 0
    pack(script, workspace, models, tmp_path / "report")
    (card,) = json.loads(program("harden", "--list", "--json").stdout)["models"]
    assert card == zoo.models()[0].card
    eight, two = card["results"]
    assert (eight["attacks"], eight["clean"]["measured"], two["clean"]["measured"]) == ([], "simulation", "engine")
    worst = max(two["attacks"], key=lambda row: row["asr"])
    text = program("harden", "--list").stdout
    (line,) = (line for line in text.splitlines() if f"{100 * worst['asr']:.1f} %, " in line)
    assert line.split()[0] == "2"
    assert f"n = {worst['n']}" in line
    assert f"{worst['patch_size']}x{worst['patch_size']}" in line
    assert f"{NAME}: Tries things out. From scratch." in text
    assert ("trust checks failed" in text) == bool(two["failed_checks"])


def test_mistakes_are_one_sentence(
    program: Program, script: ModuleType, workspace: Path, models: Path, tmp_path: Path
) -> None:
    pack(script, workspace, models)
    shutil.copytree(models / NAME, tmp_path / "beside")
    checkpoint = models / NAME / "checkpoint.safetensors"
    for spec, words in (("zoo:resnet99", f"expected one of {NAME}"), ("zoo:../beside", f"expected one of {NAME}")):
        done = program("export", spec, "--bits", "2", "--out", tmp_path / "a")
        assert (done.returncode, done.stdout) == (2, "")
        assert words in done.stderr
    done = program("export", f"zoo:{NAME}", "--bits", "3", "--out", tmp_path / "a")
    assert done.returncode == 2
    assert "its widths are 8, 2" in done.stderr
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 1
    checkpoint.write_bytes(content)
    done = program("export", f"zoo:{NAME}", "--bits", "2", "--out", tmp_path / "a")
    assert (done.returncode, done.stdout) == (2, "")
    assert "checkpoint.safetensors was changed" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "a").exists()
