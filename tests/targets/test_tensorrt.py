"""A TensorRT plan is loaded only where it was built for, and only as it was built."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from edgeguard import files
from edgeguard.errors import ArtifactError, EngineError, MissingDependency
from edgeguard.targets import tensorrt
from edgeguard.targets.tensorrt import (
    SCHEMA,
    Cuda,
    TensorRTEngine,
    check_environment,
    driver_version,
    info_path,
    read_plan_info,
)

HERE = {"tensorrt": "10.3.0", "gpu": "Orin", "compute_capability": "8.7", "driver": "CUDA 12.6"}
SHAPE = (3, 8, 8)


def write_plan(folder: Path, **changes: Any) -> Path:
    plan = folder / "model.plan"
    plan.write_bytes(b"not a real plan")
    info = {
        "schema": SCHEMA, **HERE, "onnx_sha256": "0" * 64, "plan_sha256": files.sha256(plan),
        "timing_cache_sha256": "0" * 64, "strongly_typed": True, "workspace_bytes": 1,
        "profile": {"min": 1, "opt": 2, "max": 4}, "layers": [],
    } | changes  # fmt: skip
    files.write_json(info_path(plan), {key: value for key, value in info.items() if value is not None})
    return plan


def test_metadata_is_read_back(tmp_path: Path) -> None:
    info = read_plan_info(write_plan(tmp_path))
    assert (info["gpu"], info["profile"]["max"]) == ("Orin", 4)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"schema": "edgeguard.plan/0"}, "schema"),
        ({"gpu": None}, "'gpu' is missing or not a str"),
        ({"strongly_typed": 1}, "'strongly_typed' is missing or not a bool"),
        ({"plan_sha256": "0" * 64}, "changed after it was built"),
    ],
)
def test_wrong_metadata_is_refused(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ArtifactError, match=text):
        read_plan_info(write_plan(tmp_path, **changes))


@pytest.mark.parametrize("content", [None, "", "[]", "{", json.dumps({"schema": SCHEMA})])
def test_broken_metadata_is_refused_before_anything_is_loaded(tmp_path: Path, content: str | None) -> None:
    plan = write_plan(tmp_path)
    info_path(plan).unlink()
    if content is not None:
        info_path(plan).write_text(content)
    with pytest.raises(ArtifactError):
        TensorRTEngine(plan, SHAPE, 10)


def test_a_missing_plan_is_named(tmp_path: Path) -> None:
    plan = write_plan(tmp_path)
    plan.unlink()
    with pytest.raises(ArtifactError, match=r"model\.plan does not exist"):
        read_plan_info(plan)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"gpu": "NVIDIA A100"}, r"built for TensorRT 10\.3\.0 on Orin \(8\.7\), but this is .* NVIDIA A100"),
        ({"tensorrt": "10.7.0"}, r"this is TensorRT 10\.7\.0"),
        ({"compute_capability": "9.0"}, r"\(9\.0\)"),
    ],
)
def test_a_plan_of_another_machine_is_refused(tmp_path: Path, change: dict[str, str], text: str) -> None:
    plan = write_plan(tmp_path)
    with pytest.raises(EngineError, match=text) as caught:
        check_environment(plan, read_plan_info(plan), HERE | change)
    assert "export the model again" in str(caught.value)
    assert caught.value.exit_code == 3


def test_another_driver_is_fine(tmp_path: Path) -> None:
    plan = write_plan(tmp_path)
    check_environment(plan, read_plan_info(plan), HERE | {"driver": "CUDA 13.0"})


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_without_tensorrt_the_install_command_is_given(tmp_path: Path) -> None:
    with pytest.raises(MissingDependency, match=r'pip install "edgeguard\[trt\]"'):
        TensorRTEngine(write_plan(tmp_path), SHAPE, 10)


def test_without_a_gpu_it_says_so() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    status, count = runtime.cudaGetDeviceCount()
    usable = int(count) if int(status) == 0 else 0
    with pytest.raises(MissingDependency, match=f"number {usable}" if usable else "no NVIDIA GPU can be used here: cuda"):
        Cuda(usable)


def test_driver_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "DRIVER_FILE", tmp_path / "version")
    assert driver_version(12060) == "CUDA 12.6"
    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n"
    (tmp_path / "version").write_text(text)
    assert driver_version(13000) == "550.54.15, CUDA 13.0"
