"""Post-training quantization writes a run that exports like a hardened one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgeguard.data import load_splits
from edgeguard.defences.harden import resume
from edgeguard.defences.ptq import CalibrateJob, calibration_set, quantize
from edgeguard.errors import InputError
from edgeguard.patch import Patch, square
from edgeguard.quant.width import parse_widths
from edgeguard.run import CHECKPOINT, METRICS, Run

JOB = CalibrateJob("resnet8", "digits", parse_widths("8,4"), image_size=16, calibration_images=24, eval_limit=40)
MAGENTA = square(np.array([255, 0, 255], np.uint8).reshape(3, 1, 1).repeat(4, 1).repeat(5, 2))


class Counting:
    def __init__(self) -> None:
        self.phases: dict[str, int] = {}
        self.done: dict[str, int] = {}

    def on_phase(self, name: str, total: int) -> None:
        self.phases[name], self.done[name] = total, 0

    def on_images(self, count: int) -> None:
        self.done[list(self.done)[-1]] += count


def job(**changes: Any) -> CalibrateJob:
    return dataclasses.replace(JOB, **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Counting]:
    listener = Counting()
    return quantize(JOB, tmp_path_factory.mktemp("ptq") / "run", listener, "edgeguard calibrate"), listener


def test_the_run(finished: tuple[Run, Counting]) -> None:
    run, listener = finished
    assert run.config["command"] == "edgeguard calibrate"
    assert run.config["training"]["config"]["method"] == "ptq"
    assert [str(width) for width in run.widths] == ["8", "4"]
    metrics = json.loads((run.path / METRICS).read_text())
    assert metrics["widths"].keys() == {"8", "4"}
    assert all(entry["n"] == 40 and 0 <= entry["accuracy"] <= 1 for entry in metrics["widths"].values())
    assert abs(metrics["widths"]["8"]["accuracy"] - metrics["float"]["accuracy"]) <= 0.1
    assert listener.phases == listener.done == {"calibrate": 24, "measure": 3 * 40}
    with torch.no_grad():
        assert torch.isfinite(run.load_model()(torch.zeros(1, 3, 16, 16))).all()


def test_the_same_job_gives_the_same_bytes(finished: tuple[Run, Counting], tmp_path: Path) -> None:
    again = quantize(JOB, tmp_path / "run", Counting(), "edgeguard calibrate")
    for name in ("config.json", CHECKPOINT, METRICS):
        assert (again.path / name).read_bytes() == (finished[0].path / name).read_bytes(), name


def test_it_exports(finished: tuple[Run, Counting], tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    from edgeguard.cli.pipeline import export_run

    artifact = export_run(finished[0], "4", "ort", tmp_path / "a4", proof_images=4)
    assert artifact.manifest["source"]["method"] == "ptq"
    assert artifact.manifest["source"]["patch_sizes"] is None
    assert artifact.manifest["proof"]["integer_mac_coverage"] == 1.0
    assert artifact.manifest["proof"]["identical"] is True


def test_a_weight_limit_reaches_every_layer_and_the_manifest(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    from edgeguard.cli.pipeline import export_run

    run = quantize(job(widths=parse_widths("8"), max_weight_bits=7, eval_limit=1), tmp_path / "run", Counting())
    assert Run.load(run.path).scheme().max_weight_bits == 7
    artifact = export_run(run, "8", "ort-avx2", tmp_path / "a", proof_images=2)
    assert artifact.manifest["weight_bits"] == 7
    assert artifact.target == "ort-avx2"
    graph = artifact.graph()
    weights = [node.weight for node in graph.nodes if hasattr(node, "weight")]
    assert max(int(np.abs(weight).max()) for weight in weights) == 63


def test_a_run_without_a_weight_limit_still_loads(finished: tuple[Run, Counting], tmp_path: Path) -> None:
    config = json.loads((finished[0].path / "config.json").read_text())
    del config["scheme"]["max_weight_bits"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Run.load(tmp_path).scheme() == finished[0].scheme()


def test_there_is_nothing_to_resume(finished: tuple[Run, Counting]) -> None:
    with pytest.raises(InputError, match="was calibrated, not trained"):
        resume(finished[0].path, Counting())  # type: ignore[arg-type]


def test_a_share_of_the_images_is_patched(tmp_path: Path) -> None:
    train, _ = load_splits("digits", 16)
    clean = calibration_set(JOB, train)
    MAGENTA.save(tmp_path / "patch.npz")
    given = calibration_set(job(patched=0.5, patch=tmp_path / "patch.npz"), train)
    noisy = calibration_set(job(patched=0.25, patch_size=5), train)
    default = calibration_set(job(patched=1.0), train)
    for images, count, pixels in ((given, 12, 4 * 5), (noisy, 6, 5 * 5), (default, 24, 3 * 3)):
        changed = (images != clean).any(1).sum((1, 2))
        assert (changed > 0).sum() == count
        assert changed.max() == pixels
    everywhere = (given != clean).any(1)
    assert {tuple(pixel) for pixel in given.transpose(0, 2, 3, 1)[everywhere]} == {(255, 0, 255)}
    assert not np.array_equal(noisy, calibration_set(job(patched=0.25, patch_size=5, seed=1), train))


def test_patches_widen_the_ranges(finished: tuple[Run, Counting], tmp_path: Path) -> None:
    plain = quantize(job(estimator="minmax", eval_limit=1), tmp_path / "plain", Counting()).load_model()
    patched = quantize(job(estimator="minmax", eval_limit=1, patched=1.0, patch_size=8), tmp_path / "p", Counting())
    first = [next(iter(model.groups())).log_scale[0].item() for model in (plain, patched.load_model())]
    assert first[1] > first[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"estimator": "median"}, "unknown estimator 'median'; expected one of minmax, percentile, mse, entropy"),
        ({"patched": 1.5}, "must be 0 to 1, got 1.5"),
        ({"patched": float("nan")}, "must be 0 to 1"),
        ({"calibration_images": 0}, "calibration images and eval limit >= 1"),
        ({"patch": Path("p.npz")}, "no share of images"),
        ({"patched": 0.5, "patch": Path("p.npz"), "patch_size": 3}, "a patch file has its own size"),
        ({"patched": 0.5, "patch": Path("missing.npz")}, "missing.npz does not exist"),
        ({"patched": 0.5, "patch_size": 17}, "patch of 17x17 pixels is larger than the image"),
        ({"weights": Path("missing.safetensors")}, "missing.safetensors does not exist"),
        ({"max_weight_bits": 1}, "bit-width 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_wrong_requests_leave_nothing(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        quantize(job(**changes), tmp_path / "out", Counting())
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(finished: tuple[Run, Counting]) -> None:
    with pytest.raises(InputError, match="exists already"):
        quantize(JOB, finished[0].path, Counting())


def test_the_patch_file_is_a_patch(tmp_path: Path) -> None:
    MAGENTA.save(tmp_path / "patch.npz")
    assert Patch.load(tmp_path / "patch.npz").size == (4, 5)
