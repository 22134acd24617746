"""What the doctor says about this machine, and about ones that lack something."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgeguard.targets import doctor as module
from edgeguard.targets import ort
from edgeguard.targets.doctor import doctor, format_doctor, loadable
from edgeguard.targets.profiles import BUILT_IN


def target(document: dict[str, Any], name: str) -> dict[str, Any]:
    return next(entry for entry in document["targets"] if entry["name"] == name)


def no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setattr(module, "DEVICE_TREE", tmp_path / "nothing")


def test_this_machine() -> None:
    document = json.loads(json.dumps(doctor()))
    assert [entry["name"] for entry in document["targets"]] == list(BUILT_IN)
    assert document["packages"]["numpy"]["version"]
    assert document["cpu"]["saturates"] is ort.saturates()
    assert target(document, "ort-legacy")["run"] is True
    assert target(document, "ort-legacy")["storage_bits"] == [8]
    text = format_doctor(document)
    assert all(name in text for name in (*BUILT_IN, *document["packages"]))


def test_the_probe_of_opsets_can_say_no() -> None:
    assert loadable(13, 7)
    assert not loadable(120, 7)
    assert not loadable(13, 120)


def test_a_machine_without_anything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_gpu(monkeypatch, tmp_path)
    for name in ("torch", "brevitas", "onnx", "onnxruntime", "openvino", "tensorrt"):
        monkeypatch.setitem(sys.modules, name, None)
    ort.saturates.cache_clear()
    document = doctor()
    ort.saturates.cache_clear()
    assert document["cpu"]["saturates"] is None
    assert document["gpu"]["devices"] == []
    for entry in document["targets"]:
        assert (entry["run"], entry["export"]) == (False, False)
    assert target(document, "ort")["install"] == ['pip install "edgeguard[train]"', "pip install edgeguard"]
    assert 'pip install "edgeguard[openvino]"' in target(document, "openvino")["install"]
    assert 'missing: pip install "edgeguard[trt]"' in format_doctor(document)


def test_an_older_runtime_is_told_from_a_newer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "loadable", lambda opset, ir_version: opset < 25)
    monkeypatch.setattr(module, "_saturates", lambda: True)
    document = doctor()
    assert target(document, "ort")["storage_bits"] == [4, 8]
    assert "loads no weights of 2 bits" in target(document, "ort")["notes"][0]
    assert any("saturate" in note for note in target(document, "ort")["notes"])
    assert not any("saturate" in note for note in target(document, "ort-avx2")["notes"])


def test_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_gpu(monkeypatch, tmp_path)
    assert "not installed" in doctor()["gpu"]["detail"]
    (tmp_path / "board").write_bytes(b"NVIDIA Jetson Orin Nano\0")
    monkeypatch.setattr(module, "DEVICE_TREE", tmp_path / "board")
    assert doctor()["gpu"]["devices"] == [{"name": "NVIDIA Jetson Orin Nano"}]
    program = tmp_path / "nothing" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'NVIDIA L4, 550.54, 8.9, 23034 MiB'\n")
    program.chmod(0o755)
    assert doctor()["gpu"]["devices"] == [
        {"name": "NVIDIA L4", "driver_version": "550.54", "compute_cap": "8.9", "memory.total": "23034 MiB"}
    ]
    program.write_text("#!/bin/sh\necho 'no driver' >&2\nexit 9\n")
    assert doctor()["gpu"] == {"devices": [], "detail": "nvidia-smi failed: no driver"}


def test_it_needs_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from edgeguard.targets.doctor import doctor; doctor()\n"
        "assert not {'torch', 'brevitas', 'onnx', 'openvino'} & set(sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False,
                            env={**os.environ})  # fmt: skip
    assert result.returncode == 0, result.stderr
