"""A run that names its model by code of somebody's own: the code is imported where the user says so, and nowhere else."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from command_runner import Done, execute

pytest.importorskip("torch")
pytest.importorskip("onnx")

SMALL = ("--image-size", "16", "--bits", "8,4", "--eval-limit", "20", "--calibration-images", "16", "--estimator", "minmax")
CODE = """
from pathlib import Path
from edgeguard.models import resnet8
Path("imported").touch()
def make(num_classes=10):
    return resnet8(num_classes)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With the modules `own_net`, of the user, and `strange_net`, which came with a run."""
    for name in ("own_net", "strange_net"):
        (tmp_path / f"{name}.py").write_text(CODE)
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def refused(done: Done, spec: str) -> None:
    assert done.returncode == 2
    sentence = done.stderr.strip().splitlines()[-1]
    assert f"names its model by code, {spec!r}" in sentence
    assert "add --trust-code" in sentence
    assert "Traceback" not in done.stderr


def test_export_asks_for_trust(folder: Path) -> None:
    done = execute(folder, "calibrate", "--model", "own_net:make", *SMALL, "--out", "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("next: edgeguard export run --target ort --bits 8 --trust-code\n")
    refused(execute(folder, "export", "run", "--bits", "8", "--out", "a"), "own_net:make")
    config = json.loads((folder / "run" / "config.json").read_text())
    config["model"]["spec"] = "strange_net:make"
    (folder / "run" / "config.json").write_text(json.dumps(config))
    (folder / "imported").unlink()
    refused(execute(folder, "export", "run", "--bits", "8", "--out", "a"), "strange_net:make")
    refused(execute(folder, "export", "run", "--bits", "8,4", "--pool", "--out", "a"), "strange_net:make")
    assert not (folder / "imported").exists()
    assert not (folder / "a").exists()
    done = execute(folder, "export", "run", "--bits", "8", "--proof-images", "2", "--trust-code", "--out", "a")
    assert done.returncode == 0, done.stderr
    assert (folder / "imported").exists()


def test_resume_asks_for_trust_and_start_names_the_model_itself(folder: Path) -> None:
    common = ("harden", "--model", "own_net:make", "--method", "qat", *SMALL, "--max-steps", "1", "--pretrain-epochs", "0",
              "--batch-size", "16", "--no-compile")  # fmt: skip
    done = execute(folder, *common, "--out", "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("--bits 8 --trust-code\n")
    done = execute(folder, *common, "--start", "run", "--out", "second")
    assert done.returncode == 0, done.stderr
    config = json.loads((folder / "run" / "config.json").read_text())
    config["model"]["spec"] = "strange_net:make"
    (folder / "run" / "config.json").write_text(json.dumps(config))
    (folder / "imported").unlink()
    refused(execute(folder, "harden", "--resume", "run"), "strange_net:make")
    done = execute(folder, *common, "--start", "run", "--out", "third")
    assert done.returncode == 2
    assert "its model are strange_net:make" in done.stderr
    assert not (folder / "imported").exists()
    done = execute(folder, "harden", "--resume", "run", "--trust-code")
    assert done.returncode == 0, done.stderr
    assert (folder / "imported").exists()


def test_the_names_of_the_package_need_no_trust(folder: Path) -> None:
    assert execute(folder, "calibrate", "--model", "resnet8", *SMALL, "--out", "run").returncode == 0
    done = execute(folder, "export", "run", "--bits", "8", "--proof-images", "2", "--out", "a")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("spec", ["..own_net:make", ":make", "own_net:", "broken_net:make", "own_net:make:again"])
def test_names_that_cannot_be_imported_are_a_sentence(folder: Path, spec: str) -> None:
    (folder / "broken_net.py").write_text("def make(:\n")
    done = execute(folder, "calibrate", "--model", spec, *SMALL, "--out", "run")
    assert done.returncode == 2
    assert "cannot import" in done.stderr
    assert "Traceback" not in done.stderr
